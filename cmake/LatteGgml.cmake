# ggml and libllama from the Python package llama-cpp-python, as the targets latte_ggml (gguf.h, quantised types, graphs) and latte_llama (vocabularies and
# samplers, with latte_ggml). Without it LATTE_HAS_GGML is false. An installed latte carries this file, to find them on the machine that it is on.
if(TARGET latte_ggml)
  return()
endif()
if(NOT LATTE_PYTHON)
  find_package(Python3 REQUIRED COMPONENTS Interpreter)
  set(LATTE_PYTHON ${Python3_EXECUTABLE})
endif()
# The package is found, not imported: that would load the libraries.
execute_process(
  COMMAND ${LATTE_PYTHON} -c
          "import importlib.metadata as m, importlib.util as u, pathlib; print(pathlib.Path(u.find_spec('llama_cpp').origin).parent.parent.as_posix(), m.version('llama-cpp-python'), sep=';')"
  OUTPUT_VARIABLE answer RESULT_VARIABLE failed ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE)
set(LATTE_HAS_GGML FALSE)
if(failed)
  message(STATUS "ggml: ${LATTE_PYTHON} has no llama-cpp-python")
  return()
endif()
list(GET answer 0 LATTE_GGML_FOLDER)
list(GET answer 1 LATTE_GGML_VERSION)
set(LATTE_GGML_LIBRARY_DIR ${LATTE_GGML_FOLDER}/lib)
foreach(name llama ggml ggml-cpu ggml-base)
  find_library(LATTE_LIB_${name} ${name} PATHS ${LATTE_GGML_LIBRARY_DIR} NO_DEFAULT_PATH)
  if(NOT LATTE_LIB_${name} OR NOT EXISTS ${LATTE_GGML_FOLDER}/include/gguf.h OR NOT EXISTS ${LATTE_GGML_FOLDER}/include/llama.h)
    message(STATUS "ggml: llama-cpp-python ${LATTE_GGML_VERSION} in ${LATTE_GGML_FOLDER} has no lib${name} or no headers (include/gguf.h, include/llama.h)")
    return()
  endif()
endforeach()
set(LATTE_HAS_GGML TRUE)
message(STATUS "ggml: llama-cpp-python ${LATTE_GGML_VERSION}")

# Imported, so that an export names them and leaves their paths out.
add_library(latte_ggml INTERFACE IMPORTED GLOBAL)
target_include_directories(latte_ggml SYSTEM INTERFACE ${LATTE_GGML_FOLDER}/include)
target_link_libraries(latte_ggml INTERFACE ${LATTE_LIB_ggml} ${LATTE_LIB_ggml-cpu} ${LATTE_LIB_ggml-base})
add_library(latte_llama INTERFACE IMPORTED GLOBAL)
target_link_libraries(latte_llama INTERFACE ${LATTE_LIB_llama} latte_ggml)
