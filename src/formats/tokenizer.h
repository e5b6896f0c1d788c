// The tokeniser and chat template of a pretrained model: libllama's, built from a file's metadata. libllama ends the process for
// some vocabularies, so it gets only keys that were checked.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "formats/gguf.h"

struct llama_vocab;

namespace latte::formats {

struct ChatMessage {
  std::string role;  // system, user, assistant
  std::string content;
};

// Immutable: threads may share one.
class Tokenizer {
 public:
  // From the keys tokenizer.*. Throws FormatError, which names the metadata's source: a key that is missing or of another type,
  // an unknown kind of tokeniser, a token twice, lists that differ in length, a special token that isn't there, or libllama's
  // refusal.
  explicit Tokenizer(const GgufMetadata& metadata);
  ~Tokenizer();
  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;

  int64_t size() const { return size_; }  // tokens in the vocabulary

  // Text -> tokens. `add_special`: begin (and end) as the model was trained to, with a beginning-of-sequence token or none;
  // `parse_special`: "<|im_end|>" in the text is that token, not its letters. Throws TokenError (formats/vocabulary.h) for text
  // that the vocabulary can't express, or of more than 2^31 bytes.
  std::vector<int64_t> encode(std::string_view text, bool add_special = true, bool parse_special = false) const;
  // Tokens -> text; `special` also writes control tokens. Throws TokenError for a token outside the vocabulary.
  std::string decode(std::span<const int64_t> tokens, bool special = false) const;
  // One token's bytes, which may be part of a character.
  std::string piece(int64_t token, bool special = false) const;

  std::optional<int64_t> bos() const;
  std::optional<int64_t> eos() const;
  bool ends_generation(int64_t token) const;  // end of sequence, of a turn and the like
  bool adds_bos() const;                      // encode() does with add_special

  // The prompt that stands for a conversation, to be encoded with parse_special. `add_assistant`: ends where the assistant is to
  // speak. Templates are recognised, not run: libllama knows those in use. Throws TokenError where the model has none or another.
  std::string apply_chat(std::span<const ChatMessage> messages, bool add_assistant = true) const;
  const std::string& chat_template() const { return chat_template_; }  // empty where there is none

  const llama_vocab* vocab() const;  // for libllama's samplers; lives as long as the tokenizer

 private:
  struct Model;
  std::unique_ptr<Model> model_;
  int64_t size_ = 0;
  std::string chat_template_;
};

}  // namespace latte::formats
