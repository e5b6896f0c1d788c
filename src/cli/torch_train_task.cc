// latte train --task: an encoder on a task.
#include <algorithm>
#include <filesystem>

#include "cli/torch_train.h"
#include "formats/error.h"
#include "formats/json_file.h"
#include "formats/mapped_file.h"
#include "train/task_run.h"
#include "train/task_trainer.h"

namespace latte::cli {
namespace {

using nlohmann::json;

const json kDefaultEncoder = {{"attention", "latte"}, {"num_layers", 4}, {"embed_dim", 128}, {"num_heads", 4}};

int64_t LineOf(std::string_view text, size_t offset) {
  return 1 + std::count(text.begin(), text.begin() + static_cast<std::ptrdiff_t>(std::min(offset, text.size())), '\n');
}

void RefuseTextFields(const json& training) {
  for (const char* field : train::kTextFields) {
    if (training.contains(field)) throw train::OptionError(std::string(field) + " is for --text, not for a task");
  }
}

void CheckSection(const std::string& path, const std::string& name, const json& value) {
  if (!value.is_object())
    throw formats::FormatError(path, LocatedMessage("", name + " is " + formats::shown(value) + ", expected an object"));
}

}  // namespace

void MergeFields(json& under, const json& over) {
  for (const auto& [field, value] : over.items()) under[field] = value;
}

void FillMinLr(json& training) {
  if (training.contains("lr") && training["lr"].is_number() && !training.contains("min_lr")) {
    training["min_lr"] = training["lr"].get<double>() / 10;
  }
}

json ReadTrainConfig(const std::string& path, bool paper) {
  json object = formats::read_json_object(path);
  const auto check = [&](const json& from, bool top) {
    for (const auto& [key, value] : from.items()) {
      if (top && key == "about") continue;
      const bool section = key == "model" || key == "training" || key == "task" || (top && (key == "paper" || key == "compare"));
      if (!section) {
        throw formats::FormatError(path, LocatedMessage(path, "unknown field " + formats::quote(key) +
                                                                  ", expected model, training, task, compare, paper or about"));
      }
      CheckSection(path, key, value);
    }
  };
  check(object, true);
  if (object.contains("paper")) {
    check(object["paper"], false);
    if (paper) {
      for (const auto& [section, fields] : object["paper"].items()) {
        json& under = object[section];
        if (under.is_null()) under = json::object();
        // A schedule of its own, not what suits the small size.
        MergeFields(under, fields);
      }
    }
    object.erase("paper");
  } else if (paper) {
    throw formats::FormatError(path, "has no published settings: the field paper is missing");
  }
  return object;
}

std::string LocatedMessage(const std::string& path, const std::string& message) {
  if (path.empty()) return message;
  try {
    const formats::MappedFile file(path);
    const std::string_view text = file.text();
    // The first word of the message that is a key in the file.
    for (size_t begin = 0; begin < message.size();) {
      const auto in_name = [](char c) { return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_'; };
      const auto start = std::find_if(message.begin() + static_cast<std::ptrdiff_t>(begin), message.end(), in_name);
      const auto end = std::find_if_not(start, message.end(), in_name);
      const std::string key = "\"" + std::string(start, end) + "\"";
      begin = static_cast<size_t>(end - message.begin());
      if (start == end) break;
      for (size_t at = text.find(key); at != std::string_view::npos; at = text.find(key, at + 1)) {
        const size_t colon = text.find_first_not_of(" \t\r\n", at + key.size());
        if (colon != std::string_view::npos && text[colon] == ':') {
          return "line " + std::to_string(LineOf(text, at)) + ": " + message;
        }
      }
    }
  } catch (const formats::FileError&) {  // gone meanwhile: the message is enough
  }
  return message;
}

bool IsTaskRun(const std::string& out) {
  const std::string path = formats::checkpoint_path(out);
  if (!std::filesystem::is_regular_file(path)) return false;
  const json config = json::parse(formats::CheckpointFile(path).config(), nullptr, /*allow_exceptions=*/false);
  return config.is_object() && config.contains("task");
}

json TrainTask(const TrainRequest& request, train::RunResult& result) {
  train::TaskRunResult task_result;
  json training = request.training;
  train::RunOptions run = request.run;
  RefuseTextFields(training);
  if (request.resume) {
    const formats::CheckpointFile checkpoint(formats::checkpoint_path(run.out));
    const auto record = train::TaskRecord::from(checkpoint);
    json all = record.options.to_json();
    if (training.contains("lr")) all.erase("min_lr");
    MergeFields(all, training);
    FillMinLr(all);
    const auto same = [](const json& asked, const json& found, const std::string& whose) {
      for (const auto& [field, value] : asked.items()) {
        if (!found.contains(field) || found.at(field) != value) {
          throw train::OptionError(field + " is " + formats::shown(value) + ", but the checkpoint's " + whose + " has " +
                                   (found.contains(field) ? formats::shown(found.at(field)) : "none"));
        }
      }
    };
    same(request.model, record.model.to_json(), "model");
    same(request.task, record.task.to_json(), "task");
    task_result = train::resume_task_run(train::TrainerOptions::from_json(all), run);
  } else {
    FillMinLr(training);
    const auto options = train::TrainerOptions::from_json(training);
    const auto task = TaskOptions::from_json(request.task);
    json fields = kDefaultEncoder;
    MergeFields(fields, request.model);
    for (const char* field : {"vocab_size", "num_outputs"}) {
      if (fields.contains(field)) throw train::OptionError(std::string(field) + " is the task's to say");
      fields[field] = 1;
    }
    const auto model = models::EncoderConfig::from_json(fields);
    if (run.out.empty()) run.out = "runs/" + task.name + "-" + model.attention;
    task_result = train::start_task_run(model, fields.contains("max_positions"), options, task, run);
  }
  result = task_result.run;
  json report = ReportOf(result);
  report["splits"] = task_result.splits;
  return report;
}

}  // namespace latte::cli
