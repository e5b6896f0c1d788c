#include "data/tasks.h"

#include <filesystem>
#include <nlohmann/json.hpp>

#include "data/task_file.h"
#include "formats/error.h"

namespace latte {
namespace {

TaskData make(const TaskOptions& options) {
  if (options.name == "listops") return make_listops(options);
  if (options.name == "pathfinder") return make_pathfinder(options);
  if (options.name == "associative_recall") return make_associative_recall(options);
  if (options.name == "selective_copying") return make_selective_copying(options);
  if (options.name == "needle") return make_needle(options);
  throw formats::OptionError("task " + options.name + " can't be made");
}

TaskData read(const TaskOptions& options) {
  if (options.name == "text") return read_labelled_text(options);
  if (options.name == "retrieval") return read_retrieval(options);
  if (options.name == "image") return read_images(options);
  if (options.name == "masked_language") return read_masked_language(options);
  throw formats::OptionError("task " + options.name + " can't be read");
}

// A task's generator makes other examples of the same options from one to the next. 2 of associative_recall: questions in an
// order of their own; of pathfinder: shorter dashes of long paths, and every distractor that was asked for.
int64_t generator_of(const std::string& task) { return task == "associative_recall" || task == "pathfinder" ? 2 : 1; }

// Where the file lies is no part of what it holds.
nlohmann::json recipe_of(const TaskOptions& options) {
  auto object = options.to_json();
  object.erase("data");
  object["generator"] = generator_of(options.name);
  return object;
}

}  // namespace

TaskData load_task(const TaskOptions& options, formats::FileOperations& files) {
  options.validate();
  if (!is_generated(options.name)) {
    TaskData data = read(options);
    data.check(options.data);
    return data;
  }
  if (options.data.empty()) return make(options);
  if (!std::filesystem::exists(options.data)) {
    const TaskData data = make(options);
    if (const auto folder = std::filesystem::path(options.data).parent_path(); !folder.empty()) {
      std::filesystem::create_directories(folder);
    }
    write_task(options.data, data, recipe_of(options).dump(), files);
  }
  TaskFile file = read_task(options.data);
  const auto found = nlohmann::json::parse(file.options), wanted = recipe_of(options);
  for (const auto& [field, value] : wanted.items()) {
    // Files of the first generators don't name theirs.
    const nlohmann::json made_with = found.value(field, field == "generator" ? nlohmann::json(1) : nlohmann::json());
    if (made_with != value) {
      throw formats::FormatError(options.data, "its examples were made with " + field + " " +
                                                   (made_with.is_null() ? "unknown" : formats::quote(made_with.dump())) +
                                                   ", not " + value.dump() + ": remove it or name another file");
    }
  }
  return std::move(file.data);
}

}  // namespace latte
