// Whatever bytes a token corpus has: it is refused with an error, or every token read from it is one of the vocabulary's.
#include <cstdlib>
#include <vector>

#include "formats/error.h"
#include "formats/token_corpus.h"
#include "input_file.h"

using namespace latte;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    const formats::TokenCorpus corpus(fuzz::input_file(data, size));
    std::vector<int64_t> tokens(static_cast<size_t>(corpus.size()));
    corpus.copy(0, corpus.size(), tokens.data());
    for (const int64_t token : tokens) {
      if (token < 0 || token >= corpus.vocabulary().size()) std::abort();
    }
    if (formats::Vocabulary::from_description(corpus.vocabulary().description()) != corpus.vocabulary()) std::abort();
  } catch (const formats::FormatError&) {
  }
  return 0;
}
