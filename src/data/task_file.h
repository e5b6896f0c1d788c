// Task files: a task's examples as safetensors, with this metadata:
//
//   format       "latte.task"
//   version      "2"
//   name         the task's
//   kind         classify, pairs or tokens
//   vocab_size   in decimal
//   num_classes  in decimal
//   options      a JSON object: what the examples were made with
//
// and for each split S (train, validation, test …) these tensors: "S.tokens" U8 or I32 [total], "S.offsets" I64 [sequences + 1],
// and "S.labels" I32 [examples], or for kind tokens "S.target_positions" I64 [targets], growing, into the tokens, and "S.targets"
// I32 [targets]. Version "1", whose S.targets was as long as the tokens, is read where the kind isn't tokens.
#pragma once

#include <string>

#include "data/task_data.h"
#include "formats/atomic_file.h"

namespace latte {

struct TaskFile {
  TaskData data;
  std::string options;  // a JSON object
};

// Writes `path` atomically. Throws formats::FileError.
void write_task(const std::string& path, const TaskData& data, const std::string& options,
                formats::FileOperations& operations = formats::FileOperations::system());

// The tokens of a file whose tokens are U8 stay in the mapped file. Throws formats::FileError, or formats::FormatError for a file
// that isn't a task's, is of another version, or whose content isn't whole: all of it is checked.
TaskFile read_task(const std::string& path);

}  // namespace latte
