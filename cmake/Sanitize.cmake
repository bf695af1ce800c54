# Sanitize -- WIDEHEAD_SANITIZE=address,undefined or thread, for every target
if(WIDEHEAD_SANITIZE)
  add_compile_options(-fsanitize=${WIDEHEAD_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer -g)
  add_link_options(-fsanitize=${WIDEHEAD_SANITIZE})
endif()
