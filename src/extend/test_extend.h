// A small model, a text and options of a short run, for tests of conversions.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "extend/evaluate.h"
#include "extend/extend_trainer.h"
#include "extend/run.h"
#include "extend/tiny_model.h"
#include "formats/test_files.h"

namespace latte::extend {

inline std::map<std::string, at::Tensor> copies_of(ExtendTrainer& trainer) {
  std::map<std::string, at::Tensor> copies;
  for (const auto& item : trainer.student().model->named_parameters()) copies[item.key()] = item.value().detach().clone();
  return copies;
}

class ExtendTest : public ::testing::Test {
 protected:
  ExtendTest() {
    write_tiny_model(folder_ / "base.gguf");
    std::string text;
    for (int i = 0; i < 400; ++i)
      text += "line " + std::to_string(i * i % 97) + " of a text with " + std::to_string(i % 7) + "\n";
    formats::write_bytes(folder_ / "text.txt", text);
    options_.model = folder_ / "base.gguf";
    options_.text = {folder_ / "text.txt"};
    options_.held_out_fraction = 0.1;
    options_.window = 8;
    options_.sinks = 2;
    options_.latents = 4;
    options_.match_sequences = 2;
    options_.match_steps = 6;
    options_.context = 64;
    options_.tokens = int64_t{64} * 6;
    options_.least_window = 4;
    options_.dtype = "float32";
    options_.storage = "f32";
  }

  formats::Tokenizer tokenizer() const { return formats::Tokenizer(formats::GgufFile(options_.model).metadata()); }
  TokenText text() const { return TokenText(options_.text, tokenizer(), options_.held_out_fraction, options_.context); }
  RunOptions run(const std::string& out = "out.gguf") const {
    RunOptions run;
    run.out = folder_ / out;
    run.quiet = true;
    return run;
  }
  std::vector<int64_t> some_tokens(int64_t count) const {
    auto tokens = read_tokens(options_.text[0], tokenizer());
    tokens.resize(static_cast<size_t>(count));
    return tokens;
  }

  formats::TestFolder folder_;
  ExtendOptions options_;
};

}  // namespace latte::extend
