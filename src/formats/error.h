// The errors of this rung. Their texts are one line each: control characters and overlong names that come from a file are escaped
// and cut, so that a hostile file can't write to a terminal through an error.
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>

namespace latte::formats {

// The operating system refused an operation on a file: "cannot write out/model.safetensors: No space left on device".
class FileError : public std::runtime_error {
 public:
  // `action` completes "cannot …"; `error_number` is an errno value.
  FileError(std::string_view action, const std::string& path, int error_number);

  const std::string& path() const { return path_; }
  int error_number() const { return error_number_; }

 private:
  std::string path_;
  int error_number_;
};

// The content of a file isn't what it should be: "model.safetensors: …", with what came and what was expected.
class FormatError : public std::runtime_error {
 public:
  FormatError(const std::string& path, std::string_view problem);

  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

// `text` on one line between double quotes: control characters and invalid UTF-8 as \xNN, cut after 64 characters.
std::string quote(std::string_view text);

}  // namespace latte::formats
