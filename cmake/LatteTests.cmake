# The tests that are no GoogleTest program, so that ctest runs and counts every test there is.
add_test(NAME ladder COMMAND ${LATTE_PYTHON} ${PROJECT_SOURCE_DIR}/scripts/check_ladder.py)
add_test(NAME ladder_self_test COMMAND ${LATTE_PYTHON} ${PROJECT_SOURCE_DIR}/scripts/check_ladder.py --self-test)

if(TARGET latte_ops)
  file(GLOB python_tests CONFIGURE_DEPENDS RELATIVE ${PROJECT_SOURCE_DIR}/python/tests ${PROJECT_SOURCE_DIR}/python/tests/test_*.py)
  foreach(file ${python_tests})
    string(REGEX REPLACE "^test_(.*)\\.py$" "python_\\1" name ${file})
    add_test(NAME ${name} COMMAND ${LATTE_PYTHON} -m pytest -q -p no:cacheprovider ${PROJECT_SOURCE_DIR}/python/tests/${file}
             WORKING_DIRECTORY ${PROJECT_SOURCE_DIR})
    set_tests_properties(${name} PROPERTIES ENVIRONMENT
                         "PYTHONPATH=${PROJECT_SOURCE_DIR}/python;PYTHONDONTWRITEBYTECODE=1;LATTE_OPS_LIBRARY=$<TARGET_FILE:latte_ops>;LATTE_BUILD_DIR=${PROJECT_BINARY_DIR}")
  endforeach()
endif()

# Models read by latte against the same read by llama.cpp, and the engine against the libtorch models: the one test that needs both.
if(TARGET latte_extend AND TARGET latte_runtime)
  file(GLOB pretrained_tests CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/tests/pretrained/*_test.cc)
  add_executable(pretrained_test ${pretrained_tests})
  target_link_libraries(pretrained_test PRIVATE latte_extend latte_runtime latte_llama GTest::gtest_main)
  latte_test_target(pretrained_test TORCH)
  add_test(NAME pretrained COMMAND pretrained_test)
endif()

# An installed copy has to serve a project that knows nothing but find_package(latte).
if(TARGET latte_kernels AND NOT LATTE_SANITIZE)
  set(prefix ${PROJECT_BINARY_DIR}/consumer/prefix)
  set(consumer ${PROJECT_BINARY_DIR}/consumer/build)
  add_test(NAME install COMMAND ${CMAKE_COMMAND} --install ${PROJECT_BINARY_DIR} --prefix ${prefix})
  add_test(NAME install_consumer
           COMMAND ${CMAKE_CTEST_COMMAND} --build-and-test ${PROJECT_SOURCE_DIR}/tests/consumer ${consumer} --build-generator ${CMAKE_GENERATOR}
                   --build-noclean --build-options -DCMAKE_BUILD_TYPE=Release -DCMAKE_PREFIX_PATH=${prefix} -DLATTE_PYTHON=${LATTE_PYTHON}
                   -DCMAKE_CXX_COMPILER=${CMAKE_CXX_COMPILER} -DCMAKE_CXX_COMPILER_LAUNCHER=${CMAKE_CXX_COMPILER_LAUNCHER}
                   --test-command ${consumer}/consumer)
  # The kernels alone, with a Python that has neither torch nor ggml.
  add_test(NAME install_consumer_kernels
           COMMAND ${CMAKE_CTEST_COMMAND} --build-and-test ${PROJECT_SOURCE_DIR}/tests/consumer ${consumer}-kernels --build-generator ${CMAKE_GENERATOR}
                   --build-noclean --build-options -DCMAKE_BUILD_TYPE=Release -DCMAKE_PREFIX_PATH=${prefix} -DCONSUMER_COMPONENTS=kernels
                   -DLATTE_PYTHON=/nowhere/python -DCMAKE_CXX_COMPILER=${CMAKE_CXX_COMPILER}
                   -DCMAKE_CXX_COMPILER_LAUNCHER=${CMAKE_CXX_COMPILER_LAUNCHER}
                   --test-command ${consumer}-kernels/consumer)
  set_tests_properties(install PROPERTIES FIXTURES_SETUP latte_installed)
  set_tests_properties(install_consumer install_consumer_kernels PROPERTIES FIXTURES_REQUIRED latte_installed)
endif()
