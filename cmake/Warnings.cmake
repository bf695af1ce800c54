# Warnings -- one interface target that carries the warning flags
add_library(widehead_warnings INTERFACE)
# -Wno-restrict: GCC 12 takes string concatenation for overlapping memory (its bug 105651).
target_compile_options(widehead_warnings INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wshadow -Wno-psabi> $<$<COMPILE_LANG_AND_ID:CXX,GNU>:-Wno-restrict>)
if(WIDEHEAD_WERROR)
  target_compile_options(widehead_warnings INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Werror>)
endif()
