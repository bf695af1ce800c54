# Warnings -- one interface target that carries the warning flags
add_library(widehead_warnings INTERFACE)
target_compile_options(widehead_warnings INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wshadow -Wno-psabi>)
if(WIDEHEAD_WERROR)
  target_compile_options(widehead_warnings INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Werror>)
endif()
