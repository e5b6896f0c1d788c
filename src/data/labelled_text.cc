// Documents as bytes: Text (one with a label) and Retrieval (two with a label), from files that are there already.
#include <algorithm>
#include <filesystem>
#include <limits>
#include <string_view>
#include <utility>
#include <vector>

#include "data/random.h"
#include "data/tasks.h"
#include "formats/error.h"
#include "formats/mapped_file.h"

namespace latte {
namespace {

using formats::FormatError;

constexpr uint64_t kSplitSeed = 0;  // which training examples validate: the same ones in every run

std::string at_line(size_t line) { return "line " + std::to_string(line) + ": "; }

// 0 or 1, also as 0.0 and 1.0.
int32_t label_of(std::string_view text, const std::string& path, size_t line) {
  if (text == "0" || text == "0.0") return 0;
  if (text == "1" || text == "1.0") return 1;
  throw FormatError(path, at_line(line) + "the label is " + formats::quote(text) + ", expected 0 or 1");
}

// Calls visit(line number, fields) for each line of tab-separated fields; `open`: the last of them may hold tabs.
template <typename Visit>
void visit_lines(const std::string& path, size_t fields, bool open, const Visit& visit) {
  const formats::MappedFile file(path);
  std::string_view rest = file.text();
  if (rest.empty()) throw FormatError(path, "the file is empty");
  for (size_t number = 1; !rest.empty(); ++number) {
    const size_t end = std::min(rest.find('\n'), rest.size());
    std::string_view line = rest.substr(0, end);
    rest.remove_prefix(std::min(end + 1, rest.size()));
    if (line.ends_with('\r')) line.remove_suffix(1);
    std::vector<std::string_view> found;
    while (found.size() + 1 < fields) {
      const size_t tab = line.find('\t');
      if (tab == std::string_view::npos) break;
      found.push_back(line.substr(0, tab));
      line.remove_prefix(tab + 1);
    }
    found.push_back(line);
    const size_t more = open ? 0 : static_cast<size_t>(std::count(line.begin(), line.end(), '\t'));
    if (found.size() + more != fields) {
      throw FormatError(path, at_line(number) + std::to_string(found.size() + more) + " fields between tabs, expected " +
                                  std::to_string(fields));
    }
    visit(number, found);
  }
}

struct Document {
  std::string first, second;  // `second` of a pair only
  int32_t label = 0;
};

std::string cut(std::string_view text, int64_t length, const std::string& path, size_t line, const char* field = "text") {
  if (text.empty()) throw FormatError(path, at_line(line) + "the " + field + " is empty");
  return std::string(text.substr(0, static_cast<size_t>(length)));
}

std::vector<Document> read_tsv(const std::string& path, int64_t length) {
  std::vector<Document> documents;
  visit_lines(path, 2, /*open=*/true, [&](size_t line, const std::vector<std::string_view>& fields) {
    documents.push_back({cut(fields[1], length, path, line), {}, label_of(fields[0], path, line)});
  });
  return documents;
}

// IMDB's folder: pos and neg, a file a review.
std::vector<Document> read_folder(const std::filesystem::path& folder, int64_t length) {
  std::vector<Document> documents;
  for (const auto& [name, label] : {std::pair{"neg", 0}, {"pos", 1}}) {
    std::vector<std::filesystem::path> files;
    std::error_code error;
    for (const auto& entry : std::filesystem::directory_iterator(folder / name, error)) {
      if (entry.path().extension() == ".txt") files.push_back(entry.path());
    }
    if (error) throw formats::FileError("read", (folder / name).string(), error.value());
    if (files.empty()) throw FormatError((folder / name).string(), "holds no .txt file");
    std::sort(files.begin(), files.end());
    for (const auto& path : files) {
      const formats::MappedFile file(path.string());
      documents.push_back({cut(file.text(), length, path.string(), 1), {}, label});
    }
  }
  return documents;
}

// Takes `fraction` of `documents` out, always the same ones.
std::vector<Document> take_validation(std::vector<Document>& documents, double fraction, const std::string& path) {
  RandomStream random(kSplitSeed, 0);
  for (size_t i = documents.size(); i > 1; --i) {
    std::swap(documents[i - 1], documents[static_cast<size_t>(random.below(static_cast<int64_t>(i)))]);
  }
  const auto count = static_cast<size_t>(static_cast<double>(documents.size()) * fraction);
  if (count == 0 || count == documents.size()) {
    throw FormatError(path, std::to_string(documents.size()) + " examples are too few to train and to validate on");
  }
  std::vector<Document> taken(documents.end() - static_cast<std::ptrdiff_t>(count), documents.end());
  documents.resize(documents.size() - count);
  return taken;
}

TaskExamples split_of(const std::vector<Document>& documents, bool pairs) {
  TaskBuilder builder;
  for (const Document& document : documents) {
    builder.add_bytes(document.first);
    if (pairs) builder.add_bytes(document.second);
    builder.add_label(document.label);
  }
  return builder.finish();
}

}  // namespace

// `data`: a folder of train and test, each of pos and neg with a .txt file a document (IMDB as published); or PREFIX of
// PREFIX.train.tsv and PREFIX.test.tsv; or one file of label, tab, text a line, of which the last tenth is then tested on.
TaskData read_labelled_text(const TaskOptions& options) {
  std::vector<Document> train, test;
  std::error_code ignored;
  const int64_t kept = options.crop ? std::numeric_limits<int64_t>::max() : options.length;
  if (std::filesystem::is_directory(options.data, ignored)) {
    train = read_folder(std::filesystem::path(options.data) / "train", kept);
    test = read_folder(std::filesystem::path(options.data) / "test", kept);
  } else if (std::filesystem::exists(options.data + ".train.tsv", ignored)) {
    train = read_tsv(options.data + ".train.tsv", kept);
    test = read_tsv(options.data + ".test.tsv", kept);
  } else {
    train = read_tsv(options.data, kept);
    const auto count = static_cast<std::ptrdiff_t>(train.size() / 10);
    if (count < 2)
      throw FormatError(options.data, std::to_string(train.size()) + " examples are too few to train and to test on");
    test.assign(train.end() - count, train.end());
    train.erase(train.end() - count, train.end());
    const auto other = [&](const Document& document) { return document.label != test.front().label; };
    if (std::none_of(test.begin(), test.end(), other) && std::any_of(train.begin(), train.end(), other)) {
      throw FormatError(options.data, "the last tenth of its lines, the test part, has label " +
                                          std::to_string(test.front().label) + " alone: shuffle the lines, or divide them into " +
                                          "PREFIX.train.tsv and PREFIX.test.tsv and name PREFIX");
    }
  }
  TaskData data{.name = options.name,
                .kind = TaskKind::kClassify,
                .vocab_size = 256,
                .num_classes = 2,
                .crop = options.crop ? options.length : 0};
  const auto validation = take_validation(train, options.validation_fraction, options.data);
  data.splits.emplace("train", split_of(train, false));
  data.splits.emplace("validation", split_of(validation, false));
  data.splits.emplace("test", split_of(test, false));
  return data;
}

// `data`: a folder with new_aan_pairs.train.tsv, .eval.tsv and .test.tsv, as Long Range Arena's release has it: label, two
// names of documents, which nothing reads, and the two documents a line.
TaskData read_retrieval(const TaskOptions& options) {
  TaskData data{.name = options.name, .kind = TaskKind::kPairs, .vocab_size = 256, .num_classes = 2};
  for (const auto& [name, file] : {std::pair{"train", "train"}, {"validation", "eval"}, {"test", "test"}}) {
    const std::string path = (std::filesystem::path(options.data) / ("new_aan_pairs." + std::string(file) + ".tsv")).string();
    std::vector<Document> documents;
    visit_lines(path, 5, /*open=*/false, [&](size_t line, const std::vector<std::string_view>& fields) {
      documents.push_back({cut(fields[3], options.length, path, line, "first document"),
                           cut(fields[4], options.length, path, line, "second document"), label_of(fields[0], path, line)});
    });
    data.splits.emplace(name, split_of(documents, true));
  }
  return data;
}

}  // namespace latte
