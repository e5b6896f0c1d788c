# `cmake --install`: the programs, the libraries with their headers, and the package that find_package(latte) reads. A wheel
# (SKBUILD) takes the operators' library alone, into the Python package.
include(CMakePackageConfigHelpers)

if(TARGET latte_ops)
  include(LattePython)
endif()
if(SKBUILD)
  return()
endif()

set(latte_config_dir ${CMAKE_INSTALL_LIBDIR}/cmake/latte)
file(RELATIVE_PATH latte_lib_from_bin ${CMAKE_INSTALL_FULL_BINDIR} ${CMAKE_INSTALL_FULL_LIBDIR})

# Highway is an implementation detail of the kernels: where it was built here, its archive goes along under a name of our own, so
# that it can't be mistaken for the system's.
set(LATTE_HAS_HIGHWAY_PACKAGE ${hwy_FOUND})
if(NOT hwy_FOUND)
  set_target_properties(hwy PROPERTIES OUTPUT_NAME latte_hwy EXPORT_NAME highway)
  install(TARGETS hwy EXPORT latteKernelsTargets ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
endif()

# What a rung needs outside of latte decides its set: who wants the kernels alone needs neither ggml nor libtorch.
set(latte_set_of_kernels Kernels)
set(latte_set_of_formats Ggml)
set(latte_set_of_runtime Ggml)
set(latte_set_of_ops Torch)
set(latte_set_of_nn Torch)
set(latte_set_of_models Models)
set(latte_sets "")
foreach(rung kernels formats runtime ops nn models)
  if(TARGET latte_${rung})
    # libtorch and ggml may lie anywhere: the folders that they were found in stay in what is installed.
    set_target_properties(latte_${rung} PROPERTIES EXPORT_NAME ${rung} INSTALL_RPATH "$ORIGIN;${LATTE_TORCH_LIBRARY_DIRS}")
    add_library(latte::${rung} ALIAS latte_${rung})
    install(TARGETS latte_${rung} EXPORT latte${latte_set_of_${rung}}Targets
            ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
    install(DIRECTORY ${PROJECT_SOURCE_DIR}/src/${rung} DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/latte
            FILES_MATCHING PATTERN "*.h" PATTERN "*-inl.h" EXCLUDE)
    list(APPEND latte_sets ${latte_set_of_${rung}})
  endif()
endforeach()
list(REMOVE_DUPLICATES latte_sets)

foreach(program latte latte-torch)
  if(TARGET ${program})
    set_target_properties(${program} PROPERTIES INSTALL_RPATH
                          "$ORIGIN/${latte_lib_from_bin};${LATTE_GGML_LIBRARY_DIR};${LATTE_TORCH_LIBRARY_DIRS}")
    install(TARGETS ${program} RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
  endif()
endforeach()

foreach(set ${latte_sets})
  install(EXPORT latte${set}Targets NAMESPACE latte:: DESTINATION ${latte_config_dir})
endforeach()
configure_package_config_file(cmake/latteConfig.cmake.in ${PROJECT_BINARY_DIR}/latteConfig.cmake INSTALL_DESTINATION ${latte_config_dir})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/latteConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/latteConfig.cmake ${PROJECT_BINARY_DIR}/latteConfigVersion.cmake cmake/LatteTorch.cmake
              cmake/LatteGgml.cmake
        DESTINATION ${latte_config_dir})
install(FILES LICENSE README.md DESTINATION ${CMAKE_INSTALL_DOCDIR})
