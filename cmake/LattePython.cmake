# The Python package's share of the build. liblatte_ops.torch.txt lies beside the operators' library and names the torch that it was linked
# against, so that python/latte/_library.py can tell a mismatch from a broken library.
file(WRITE ${PROJECT_BINARY_DIR}/liblatte_ops.torch.txt "${LATTE_TORCH_VERSION}\n")

# pip install (scikit-build-core) puts the library into the package's folder; torch is a neighbour of that folder in site-packages.
if(SKBUILD)
  set_target_properties(latte_ops PROPERTIES INSTALL_RPATH "$ORIGIN;$ORIGIN/../torch/lib" BUILD_WITH_INSTALL_RPATH ON)
  install(TARGETS latte_ops LIBRARY DESTINATION latte COMPONENT python)
  install(FILES ${PROJECT_BINARY_DIR}/liblatte_ops.torch.txt DESTINATION latte COMPONENT python)
endif()
