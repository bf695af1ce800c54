# Warnings -- one interface target that carries the warning flags
add_library(widehead_warnings INTERFACE)
# -Wno-restrict: GCC 12 reports string concatenation (its bug 105651).
target_compile_options(widehead_warnings INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wshadow -Wno-psabi $<$<CXX_COMPILER_ID:GNU>:-Wno-restrict>>)
if(WIDEHEAD_WERROR)
  target_compile_options(widehead_warnings INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Werror>)
endif()
