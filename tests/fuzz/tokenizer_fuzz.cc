// Whatever a file says about its vocabulary: it is refused with an error, or libllama takes it, and text and tokens can be put
// through it. libllama isn't instrumented, but ends the process where its own checks fail.
#include <array>
#include <cstdlib>
#include <vector>

#include "formats/error.h"
#include "formats/gguf.h"
#include "formats/tokenizer.h"
#include "formats/vocabulary.h"
#include "input_file.h"

using namespace latte;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    const formats::GgufFile file(fuzz::input_file(data, size));
    const formats::Tokenizer tokenizer(file.metadata());
    constexpr std::array<std::string_view, 4> kTexts = {"ab cab <|end|>\n",
                                                        "gr\xC3\xB6\xC3\x9F"
                                                        "er \xF0\x9F\xA6\x8A",
                                                        "\xFF\xC0 broken", ""};
    for (const auto text : kTexts) {
      try {
        tokenizer.decode(tokenizer.encode(text, true, true), true);
        tokenizer.decode(tokenizer.encode(text, false, false));
      } catch (const formats::TokenError&) {
      }
    }
    for (int64_t token = 0; token < tokenizer.size(); ++token) {
      try {
        tokenizer.piece(token, token % 2 == 0);
      } catch (const formats::TokenError&) {
      }
    }
    try {
      const std::array<formats::ChatMessage, 2> messages = {{{"system", "a"}, {"user", "b"}}};
      tokenizer.apply_chat(messages);
    } catch (const formats::TokenError&) {
    }
  } catch (const formats::FormatError&) {
  }
  return 0;
}
