# Install -- cmake --install: the static library, its headers, and what find_package(widehead) reads
#
# Not with the Python module: a wheel would take the files into site-packages.
if(WIDEHEAD_PYTHON)
  return()
endif()
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

install(TARGETS widehead EXPORT wideheadTargets ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(DIRECTORY ${PROJECT_SOURCE_DIR}/cpp/include/widehead DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} FILES_MATCHING PATTERN "*.h")
set(_package ${CMAKE_INSTALL_LIBDIR}/cmake/widehead)
install(EXPORT wideheadTargets NAMESPACE widehead:: DESTINATION ${_package})
configure_package_config_file(${PROJECT_SOURCE_DIR}/cmake/wideheadConfig.cmake.in
  ${PROJECT_BINARY_DIR}/wideheadConfig.cmake INSTALL_DESTINATION ${_package})
# Before 1.0 a minor version may change the interface.
write_basic_package_version_file(${PROJECT_BINARY_DIR}/wideheadConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/wideheadConfig.cmake ${PROJECT_BINARY_DIR}/wideheadConfigVersion.cmake
  DESTINATION ${_package})
