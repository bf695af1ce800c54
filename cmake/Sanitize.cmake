# Sanitize -- WIDEHEAD_SANITIZE=address,undefined or thread, for every target
#
# At -O1 the checked kernels compile four times as fast as at -O3; so much the more is built and run in a given time.
if(WIDEHEAD_SANITIZE)
  add_compile_options(-fsanitize=${WIDEHEAD_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer -g1 -O1)
  add_link_options(-fsanitize=${WIDEHEAD_SANITIZE})
endif()
