# -DLATTE_FUZZ=ON (preset fuzz, clang): the target `fuzz` builds a libFuzzer program fuzz_NAME of each tests/fuzz/NAME_fuzz.cc, and make_seeds.
# Compiler flags are set before any target is: see CMakeLists.txt.
set(fuzz_folder ${PROJECT_SOURCE_DIR}/tests/fuzz)
add_custom_target(fuzz)
file(GLOB fuzz_sources CONFIGURE_DEPENDS ${fuzz_folder}/*_fuzz.cc)
foreach(source ${fuzz_sources})
  string(REGEX REPLACE ".*/(.*)_fuzz\\.cc$" "fuzz_\\1" name ${source})
  add_executable(${name} EXCLUDE_FROM_ALL ${source})
  target_link_libraries(${name} PRIVATE latte_formats latte_runtime)
  target_link_options(${name} PRIVATE -fsanitize=fuzzer)
  add_dependencies(fuzz ${name})
endforeach()
# The rung models needs libtorch, this file of it doesn't.
target_sources(fuzz_checkpoint PRIVATE ${PROJECT_SOURCE_DIR}/src/models/language_model_config.cc)
add_executable(make_seeds EXCLUDE_FROM_ALL ${fuzz_folder}/make_seeds.cc)
target_link_libraries(make_seeds PRIVATE latte_runtime)
add_dependencies(fuzz make_seeds)
