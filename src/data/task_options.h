// What a task is told: as a value and as JSON. The defaults are the published sizes; docs/tasks.md describes each task.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "formats/option_error.h"

namespace latte {

struct TaskOptions {
  std::string name;  // one of task_names()
  // Generated tasks: a file to keep the examples in; it is made where it isn't there; none: in memory alone.
  // The others: the file or folder to read.
  std::string data;

  // Generated tasks.
  int64_t seed = 1;
  int64_t train = 0;       // examples; the default depends on the task
  int64_t validation = 0;  // and of each split to test on
  int64_t test = 0;

  // listops: a drawn expression counts if it has more than min_length and less than max_length tokens.
  int64_t min_length = 500;
  int64_t max_length = 2000;
  int64_t max_depth = 10;
  int64_t max_arguments = 10;

  // text, retrieval: bytes of a document that are read. The probes: tokens of a sequence. masked_language: of a window.
  int64_t length = 0;
  std::vector<int64_t> test_lengths;  // probes: splits test_LENGTH beside `test`, whose length is `length`
  // text: documents are kept whole, training reads a random stretch of `length` bytes each time, and an answer is the mean over
  // the stretches that cover a document.
  bool crop = false;
  double validation_fraction = 0.1;  // text, image, masked_language: of the training examples where the data has no such part

  // pathfinder
  int64_t size = 32;            // pixels a side
  int64_t contour_length = 14;  // dashes of the two long paths
  int64_t distractors = 6;      // short paths
  int64_t levels = 256;         // of grey that a pixel is rounded to, and so different tokens

  int64_t pairs = 0;     // associative_recall: keys and values to remember
  int64_t keys = 0;      // associative_recall: how many there are; as many values
  int64_t symbols = 16;  // selective_copying, needle: tokens to copy are drawn from
  int64_t copies = 16;   // selective_copying: tokens to copy

  double mask_fraction = 0.15;  // masked_language

  void validate() const;             // throws formats::OptionError
  int64_t longest_sequence() const;  // in tokens: what no example of the task exceeds
  nlohmann::json to_json() const;    // the fields that `name` has
  // Takes an object that has at least `name`. Throws formats::OptionError: an unknown task, a field that it doesn't have, a wrong
  // type, an impossible value.
  static TaskOptions from_json(const nlohmann::json& json);
  static TaskOptions defaults(const std::string& name);

  bool operator==(const TaskOptions&) const = default;
};

std::span<const std::string_view> task_names();
bool is_generated(std::string_view task);

}  // namespace latte
