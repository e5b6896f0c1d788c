# libtorch from the Python package, as the target latte_libtorch. Its paths come from torch.utils.cpp_extension: find_package(Torch) stops where torch was
# built for CUDA and no CUDA toolkit is installed. An installed latte carries this file, to find libtorch on the machine that it is on.
if(TARGET latte_libtorch)
  return()
endif()
if(NOT LATTE_PYTHON)
  find_package(Python3 REQUIRED COMPONENTS Interpreter)
  set(LATTE_PYTHON ${Python3_EXECUTABLE})
endif()
execute_process(
  COMMAND ${LATTE_PYTHON} -c
          "import torch; from torch.utils import cpp_extension as c; print(';'.join(c.include_paths())); print(';'.join(c.library_paths())); print(torch.__version__); print(int(torch._C._GLIBCXX_USE_CXX11_ABI))"
  OUTPUT_VARIABLE answer RESULT_VARIABLE failed ERROR_VARIABLE problem OUTPUT_STRIP_TRAILING_WHITESPACE)
if(failed)
  message(FATAL_ERROR "${LATTE_PYTHON} has no usable torch (pip install torch==2.13.0), or configure with -DLATTE_TORCH=OFF:\n${problem}")
endif()
string(REPLACE ";" "\\;" answer "${answer}")
string(REPLACE "\n" ";" answer "${answer}")
list(GET answer 0 LATTE_TORCH_INCLUDES)
list(GET answer 1 LATTE_TORCH_LIBRARY_DIRS)
list(GET answer 2 LATTE_TORCH_VERSION)
list(GET answer 3 LATTE_TORCH_CXX11_ABI)
message(STATUS "torch ${LATTE_TORCH_VERSION}")

# Imported, so that an export names it and leaves its paths out.
add_library(latte_libtorch INTERFACE IMPORTED GLOBAL)
target_include_directories(latte_libtorch SYSTEM INTERFACE ${LATTE_TORCH_INCLUDES})
target_compile_definitions(latte_libtorch INTERFACE _GLIBCXX_USE_CXX11_ABI=${LATTE_TORCH_CXX11_ABI})
foreach(name torch torch_cpu c10)
  find_library(LATTE_LIB_${name} ${name} PATHS ${LATTE_TORCH_LIBRARY_DIRS} NO_DEFAULT_PATH REQUIRED)
  target_link_libraries(latte_libtorch INTERFACE ${LATTE_LIB_${name}})
endforeach()

# at::parallel_for is a template: compiled without OpenMP it runs on one thread, and says nothing. The runtime is the one that torch
# brings, so that its threads are torch's.
if(NOT CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  message(WARNING "latte's threads are torch's, which this pip package runs on GCC's OpenMP: ${CMAKE_CXX_COMPILER_ID} may not link "
                  "with it. Use g++.")
endif()
target_compile_options(latte_libtorch INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-fopenmp>)
foreach(folder ${LATTE_TORCH_LIBRARY_DIRS})
  file(GLOB LATTE_TORCH_OPENMP ${folder}/libgomp*.so*)
  if(LATTE_TORCH_OPENMP)
    break()
  endif()
endforeach()
if(LATTE_TORCH_OPENMP)
  target_link_libraries(latte_libtorch INTERFACE ${LATTE_TORCH_OPENMP})
else()
  find_package(OpenMP REQUIRED COMPONENTS CXX)
  target_link_libraries(latte_libtorch INTERFACE OpenMP::OpenMP_CXX)
endif()
