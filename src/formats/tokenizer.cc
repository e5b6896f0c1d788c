#include "formats/tokenizer.h"

#include <llama.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <limits>
#include <mutex>
#include <unordered_set>

#include "formats/error.h"
#include "formats/vocabulary.h"

namespace latte::formats {
namespace {

// Where a file names no special tokens libllama has numbers of its own, up to 11.
constexpr int64_t kLeastTokens = 12, kMostTokens = int64_t{1} << 24;

// What libllama relies on, and ends the process (or reads past a list's end) without. Returns the number of tokens.
int64_t check(const GgufMetadata& metadata) {
  const std::string& model = metadata.string("tokenizer.ggml.model");
  const bool bpe = model == "gpt2", sentencepiece = model == "llama";
  if (!bpe && !sentencepiece) metadata.refuse("tokenizer.ggml.model", "\"gpt2\" (byte pairs) or \"llama\" (SentencePiece)");

  const std::vector<std::string>& tokens = metadata.strings("tokenizer.ggml.tokens");
  const auto count = static_cast<int64_t>(tokens.size());
  if (count < kLeastTokens || count > kMostTokens) {
    metadata.refuse("tokenizer.ggml.tokens", std::to_string(kLeastTokens) + " … " + std::to_string(kMostTokens) + " tokens");
  }
  std::unordered_set<std::string> seen;
  seen.reserve(tokens.size());
  for (size_t i = 0; i < tokens.size(); ++i) {
    // libllama's own name for a token without text.
    const std::string& name = tokens[i].empty() ? "[EMPTY_" + std::to_string(i) + "]" : tokens[i];
    if (name.find('\0') != name.npos) {
      throw FormatError(metadata.source(), "token " + std::to_string(i) + ", " + quote(name) + ", holds a NUL");
    }
    if (!seen.insert(name).second) {
      throw FormatError(metadata.source(), "token " + std::to_string(i) + ", " + quote(name) + ", is in the vocabulary twice");
    }
  }

  const auto of_each_token = [&](const char* key, auto empty, const char* what) {
    using T = decltype(empty);
    if (!metadata.has(key)) return;
    const auto* array = std::get_if<GgufArray>(metadata.find(key));
    const auto* held = array ? std::get_if<std::vector<T>>(array) : nullptr;
    if (held == nullptr || held->size() != tokens.size()) {
      metadata.refuse(key, std::to_string(tokens.size()) + " " + what + ", one for each token");
    }
    if constexpr (std::is_floating_point_v<T>) {
      if (!std::all_of(held->begin(), held->end(), [](T score) { return std::isfinite(score); })) {
        metadata.refuse(key, "finite numbers");
      }
    }
  };
  of_each_token("tokenizer.ggml.scores", float{}, "float32");
  of_each_token("tokenizer.ggml.token_type", int32_t{}, "int32");
  if (sentencepiece && !metadata.has("tokenizer.ggml.scores")) metadata.refuse("tokenizer.ggml.scores", "a score for each token");

  if (bpe) {
    const std::vector<std::string>& merges = metadata.strings("tokenizer.ggml.merges");
    const auto wrong = std::find_if(merges.begin(), merges.end(), [](const std::string& merge) {
      const size_t blank = merge.find(' ', 1);
      return merge.empty() || blank == merge.npos || blank + 1 == merge.size() || merge.find('\0') != merge.npos;
    });
    if (wrong != merges.end()) {
      throw FormatError(metadata.source(), "merge " + std::to_string(wrong - merges.begin()) + " is " + quote(*wrong) +
                                               ", expected two pieces with a blank between them");
    }
  }
  return count;
}

bool is_special_token(std::string_view key) { return key.starts_with("tokenizer.ggml.") && key.ends_with("_token_id"); }

// The keys that libllama gets: what it needs of an architecture (none of it matters to a vocabulary) and the tokeniser's.
GgufMetadata vocabulary_of(const GgufMetadata& metadata, int64_t count) {
  GgufMetadata vocabulary(metadata.source());
  vocabulary.set("general.architecture", std::string("llama"));
  vocabulary.set("llama.vocab_size", static_cast<uint32_t>(count));
  constexpr std::array kStrings = {"tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.chat_template"};
  constexpr std::array kBooleans = {"tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token",
                                    "tokenizer.ggml.add_sep_token", "tokenizer.ggml.add_space_prefix",
                                    "tokenizer.ggml.remove_extra_whitespaces"};
  for (const char* key : kStrings) {
    if (!metadata.has(key)) continue;
    const std::string& text = metadata.string(key);
    if (text.find('\0') != text.npos) metadata.refuse(key, "text without NUL");
    vocabulary.set(key, text);
  }
  for (const char* key : kBooleans) {
    if (metadata.has(key)) vocabulary.set(key, metadata.boolean(key));
  }
  for (const auto& [key, value] : metadata.entries()) {
    if (is_special_token(key)) vocabulary.set(key, static_cast<uint32_t>(metadata.integer(key, 0, count - 1)));
  }
  for (const char* key :
       {"tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.token_type", "tokenizer.ggml.merges"}) {
    if (const GgufValue* value = metadata.find(key)) vocabulary.set(key, *value);
  }
  return vocabulary;
}

// The first error of libllama's log since it was cleared: those that follow say less.
std::string first_error;

void keep_first_error(ggml_log_level level, const char* text, void*) {
  if (level == GGML_LOG_LEVEL_ERROR && first_error.empty())
    first_error = std::string_view(text).substr(0, std::string_view(text).find('\n'));
}

struct Close {
  void operator()(std::FILE* file) const { std::fclose(file); }
};

std::unique_ptr<std::FILE, Close> in_memory(const std::string& bytes, const std::string& source) {
  const int fd = ::memfd_create("vocabulary", MFD_CLOEXEC);
  if (fd < 0) throw FileError("make a file in memory for the vocabulary of", source, errno);
  std::unique_ptr<std::FILE, Close> file(::fdopen(fd, "w+b"));
  if (!file) {
    const int error_number = errno;
    ::close(fd);
    throw FileError("make a file in memory for the vocabulary of", source, error_number);
  }
  if (std::fwrite(bytes.data(), 1, bytes.size(), file.get()) != bytes.size() || std::fflush(file.get()) != 0) {
    throw FileError("make a file in memory for the vocabulary of", source, errno);
  }
  std::rewind(file.get());
  return file;
}

std::optional<int64_t> valid(llama_token token) {
  return token == LLAMA_TOKEN_NULL ? std::nullopt : std::optional<int64_t>(token);
}

// Calls `fill(buffer, size)`, which returns how much it wrote, or minus how much it needs.
template <typename Buffer, typename Fill>
void fill(Buffer& buffer, const Fill& fill_buffer) {
  int32_t size = fill_buffer(buffer.data(), static_cast<int32_t>(buffer.size()));
  if (size == std::numeric_limits<int32_t>::min()) throw TokenError("the text makes more than 2^31 tokens");
  if (size < 0) {
    buffer.resize(static_cast<size_t>(-size));
    size = fill_buffer(buffer.data(), static_cast<int32_t>(buffer.size()));
  }
  buffer.resize(static_cast<size_t>(std::max(size, 0)));
}

}  // namespace

struct Tokenizer::Model {
  struct Free {
    void operator()(llama_model* model) const { llama_model_free(model); }
  };
  std::unique_ptr<llama_model, Free> llama;
  const llama_vocab* vocab = nullptr;
};

Tokenizer::Tokenizer(const GgufMetadata& metadata) : model_(std::make_unique<Model>()), size_(check(metadata)) {
  const GgufMetadata vocabulary = vocabulary_of(metadata, size_);
  chat_template_ = vocabulary.string_or("tokenizer.chat_template", "");
  const auto file = in_memory(gguf_without_tensors(vocabulary), metadata.source());

  // The log is the process's: it belongs to this load until it is done.
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  static const bool ready = (llama_backend_init(), true);
  static_cast<void>(ready);
  ggml_log_callback callback = nullptr;
  void* data = nullptr;
  llama_log_get(&callback, &data);
  llama_log_set(keep_first_error, nullptr);
  first_error.clear();
  std::string problem;
  try {
    llama_model_params params = llama_model_default_params();
    params.vocab_only = true;
    params.load_mode = LLAMA_LOAD_MODE_NONE;
    model_->llama.reset(llama_model_load_from_file_ptr(file.get(), params));
  } catch (const std::exception& error) {
    problem = error.what();
  }
  llama_log_set(callback, data);
  if (!model_->llama) {
    throw FormatError(metadata.source(), "libllama refuses the vocabulary: " + quote(problem.empty() ? first_error : problem));
  }
  model_->vocab = llama_model_get_vocab(model_->llama.get());
  const llama_vocab* vocab = model_->vocab;
  const auto refuse_without = [&](bool added, llama_token token, const char* name) {
    if (!added || token != LLAMA_TOKEN_NULL) return;
    throw FormatError(metadata.source(), "the vocabulary adds its " + std::string(name) + " token to texts and has none");
  };
  refuse_without(llama_vocab_get_add_bos(vocab), llama_vocab_bos(vocab), "beginning-of-sequence");
  refuse_without(llama_vocab_get_add_eos(vocab), llama_vocab_eos(vocab), "end-of-sequence");
  refuse_without(llama_vocab_get_add_sep(vocab), llama_vocab_sep(vocab), "separator");
  if (llama_vocab_n_tokens(model_->vocab) != size_) {
    throw FormatError(metadata.source(), "libllama reads " + std::to_string(llama_vocab_n_tokens(model_->vocab)) +
                                             " tokens of a vocabulary of " + std::to_string(size_));
  }
}

Tokenizer::~Tokenizer() = default;
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;

const llama_vocab* Tokenizer::vocab() const { return model_->vocab; }
std::optional<int64_t> Tokenizer::bos() const { return valid(llama_vocab_bos(model_->vocab)); }
std::optional<int64_t> Tokenizer::eos() const { return valid(llama_vocab_eos(model_->vocab)); }
bool Tokenizer::adds_bos() const { return llama_vocab_get_add_bos(model_->vocab); }

bool Tokenizer::ends_generation(int64_t token) const {
  return token >= 0 && token < size_ && llama_vocab_is_eog(model_->vocab, static_cast<llama_token>(token));
}

std::vector<int64_t> Tokenizer::encode(std::string_view text, bool add_special, bool parse_special) const {
  constexpr size_t kLongest = std::numeric_limits<int32_t>::max();
  if (text.size() > kLongest) {
    throw TokenError("a text of " + std::to_string(text.size()) + " bytes, expected at most " + std::to_string(kLongest));
  }
  std::vector<llama_token> tokens(text.size() / 3 + 16);
  try {
    fill(tokens, [&](llama_token* buffer, int32_t size) {
      return llama_tokenize(model_->vocab, text.data(), static_cast<int32_t>(text.size()), buffer, size, add_special,
                            parse_special);
    });
  } catch (const TokenError&) {
    throw;
  } catch (const std::exception& error) {
    throw TokenError("the vocabulary can't express the text: " + quote(error.what()));
  }
  return {tokens.begin(), tokens.end()};
}

std::string Tokenizer::piece(int64_t token, bool special) const {
  if (token < 0 || token >= size_) {
    throw TokenError("invalid token " + std::to_string(token) + ": expected 0 to " + std::to_string(size_ - 1));
  }
  std::string text(32, '\0');
  try {
    fill(text, [&](char* buffer, int32_t size) {
      return llama_token_to_piece(model_->vocab, static_cast<llama_token>(token), buffer, size, /*lstrip=*/0, special);
    });
  } catch (const TokenError&) {
    throw;
  } catch (const std::exception& error) {
    throw TokenError("token " + std::to_string(token) + " makes no text: " + quote(error.what()));
  }
  return text;
}

std::string Tokenizer::decode(std::span<const int64_t> tokens, bool special) const {
  std::string text;
  for (int64_t token : tokens) text += piece(token, special);
  return text;
}

std::string Tokenizer::apply_chat(std::span<const ChatMessage> messages, bool add_assistant) const {
  // A base model has the tokens of its family's template, and no template.
  std::string found = chat_template_;
  const auto has = [&](std::string_view token) { return encode(token, false, true).size() == 1; };
  if (found.empty() && has("<start_of_turn>")) found = "gemma";
  if (found.empty() && has("<|im_start|>")) found = "chatml";
  if (found.empty()) throw TokenError("the model has no chat template");
  std::vector<llama_chat_message> chat;
  size_t size = 256;
  for (const ChatMessage& message : messages) {
    chat.push_back({message.role.c_str(), message.content.c_str()});
    size += 2 * (message.role.size() + message.content.size());
  }
  std::string text(size, '\0');
  for (int attempt = 0; attempt < 2; ++attempt) {
    const int32_t length = llama_chat_apply_template(found.c_str(), chat.data(), chat.size(), add_assistant, text.data(),
                                                     static_cast<int32_t>(text.size()));
    if (length < 0) throw TokenError("the model's chat template is none that libllama knows: " + quote(found));
    const bool fits = static_cast<size_t>(length) <= text.size();
    text.resize(static_cast<size_t>(length));
    if (fits) break;
  }
  return text;
}

}  // namespace latte::formats
