// All tasks by name, and their generators and loaders.
#pragma once

#include <string>
#include <vector>

#include "data/task_data.h"
#include "data/task_options.h"
#include "formats/atomic_file.h"

namespace latte {

// Makes or reads the task's examples. A generated task with a `data` path is read from it where the file is there, if it was made
// with the same options, else made and written to it. Throws formats::OptionError, formats::FileError and formats::FormatError.
TaskData load_task(const TaskOptions& options, formats::FileOperations& files = formats::FileOperations::system());

// Generators: the same options give the same examples, whatever the number of threads.
TaskData make_listops(const TaskOptions& options);
TaskData make_pathfinder(const TaskOptions& options);
TaskData make_associative_recall(const TaskOptions& options);
TaskData make_selective_copying(const TaskOptions& options);
TaskData make_needle(const TaskOptions& options);

// Loaders. Errors name the file and, where it has lines, the line and the field.
TaskData read_labelled_text(const TaskOptions& options);
TaskData read_retrieval(const TaskOptions& options);
TaskData read_masked_language(const TaskOptions& options);
TaskData read_images(const TaskOptions& options);

// An expression's tokens (make_listops' numbers) as text, and its value by evaluating them; for tests and for looking at.
std::string listops_text(const std::vector<int32_t>& tokens);
int32_t listops_value(const std::vector<int32_t>& tokens);

}  // namespace latte
