// latte train --task: an encoder on a task.
#include <algorithm>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

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

bool IsNameCharacter(char c) { return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_'; }

// Where the key `field` stands in a JSON text, the first at or behind `from`; npos: nowhere.
size_t FindKey(std::string_view text, std::string_view field, size_t from) {
  std::string key = "\"";
  key.append(field).push_back('"');
  for (size_t at = text.find(key, from); at != std::string_view::npos; at = text.find(key, at + 1)) {
    const size_t colon = text.find_first_not_of(" \t\r\n", at + key.size());
    if (colon != std::string_view::npos && text[colon] == ':') return at;
  }
  return std::string_view::npos;
}

// The text, number or name that is the value of the key at `at`; null where it is an array or an object.
json ValueAt(std::string_view text, size_t at) {
  const size_t begin = text.find_first_not_of(" \t\r\n", text.find(':', text.find('"', at + 1)) + 1);
  if (begin == std::string_view::npos) return nullptr;
  size_t end = text.find_first_of(",}] \t\r\n", begin);
  if (text[begin] == '"') end = std::min(text.find('"', begin + 1), text.size() - 1) + 1;
  return json::parse(text.substr(begin, end - begin), nullptr, /*allow_exceptions=*/false);
}

struct Subject {
  std::string field, value;  // value: as the message shows it, quotes aside; empty where it shows none
};

// What an error is about: `unknown … "FIELD"`, `FIELD is VALUE, expected …`, or else the first word in it that is a key of
// `text`.
Subject SubjectOf(const std::string& message, std::string_view text) {
  const auto word_before = [&](size_t end) {
    size_t begin = end;
    while (begin > 0 && IsNameCharacter(message[begin - 1])) --begin;
    return message.substr(begin, end - begin);
  };
  if (const size_t unknown = message.find("unknown "); unknown != std::string::npos) {
    const size_t open = message.find('"', unknown), close = message.find('"', open + 1);
    if (open != std::string::npos && close != std::string::npos) return {message.substr(open + 1, close - open - 1), ""};
  }
  if (const size_t is = message.find(" is "); is != std::string::npos && !word_before(is).empty()) {
    constexpr size_t kIs = 4;
    const size_t end = message.find(", expected", is);
    std::string value = end == std::string::npos ? "" : message.substr(is + kIs, end - is - kIs);  // or: is for …, is the task's
    std::erase(value, '"');
    return {word_before(is), value};
  }
  for (size_t begin = 0; begin < message.size(); ++begin) {
    size_t end = begin;
    while (end < message.size() && IsNameCharacter(message[end])) ++end;
    const std::string word = message.substr(begin, end - begin);
    if (!word.empty() && FindKey(text, word, 0) != std::string_view::npos) return {word, ""};
    begin = end;
  }
  return {};
}

// Whether a message that shows `value` may mean `found`: 1.0 is 1.
bool Shows(const std::string& value, const json& found) {
  if (found.is_string()) return value == found.get<std::string>();
  if (!found.is_number()) return value == found.dump();
  const json number = json::parse(value, nullptr, /*allow_exceptions=*/false);
  return number.is_number() && number.get<double>() == found.get<double>();
}

// The section that refuses an unknown field, whose name another section may have; empty where the message is of something else.
std::string_view RefusingSection(const std::string& message) {
  constexpr std::pair<const char*, const char*> kSections[] = {{"unknown training option", "training"},
                                                               {"unknown option of task", "task"},
                                                               {"unknown comparison's field", "compare"},
                                                               {"model config: unknown field", "model"}};
  for (const auto& [refusal, section] : kSections) {
    if (message.find(refusal) != std::string::npos) return section;
  }
  return {};
}

// One past the object that is the value of the key at `at`.
size_t EndOfObject(std::string_view text, size_t at) {
  int64_t depth = 0;
  bool quoted = false;
  for (size_t i = text.find(':', text.find('"', at + 1)); i < text.size(); ++i) {
    if (text[i] == '\\') {
      ++i;
    } else if (text[i] == '"') {
      quoted = !quoted;
    } else if (!quoted && text[i] == '{') {
      ++depth;
    } else if (!quoted && text[i] == '}' && --depth <= 0) {
      return i + 1;
    }
  }
  return text.size();
}

// The first place of `field` in a section of that name.
std::optional<size_t> PlaceInSection(std::string_view text, std::string_view section, const std::string& field) {
  for (size_t at = FindKey(text, section, 0); at != std::string_view::npos; at = FindKey(text, section, at + 1)) {
    const size_t found = FindKey(text.substr(0, EndOfObject(text, at)), field, at + 1);
    if (found != std::string_view::npos) return found;
  }
  return {};
}

// The first place where `field` has that value: a configuration may name it for its small and its published size, and a value
// that stands nowhere comes from the command line.
std::optional<size_t> PlaceOf(std::string_view text, const std::string& field, const std::string& value) {
  if (field.empty()) return {};
  for (size_t at = FindKey(text, field, 0); at != std::string_view::npos; at = FindKey(text, field, at + 1)) {
    const json found = ValueAt(text, at);
    const bool compares = !value.empty() && !found.is_null() && !found.is_discarded();
    if (!compares || Shows(value, found) || value.ends_with("…")) return at;  // cut short
  }
  return {};
}

// `top`: not within `paper`, whose lines aren't told from those of the sections outside.
void CheckSection(const std::string& path, const std::string& name, const json& value, bool top) {
  if (value.is_object()) return;
  throw formats::FormatError(path,
                             LocatedMessage(top ? path : "", name + " is " + formats::shown(value) + ", expected an object"));
}

}  // namespace

void MergeFields(json& under, const json& over) {
  for (const auto& [field, value] : over.items()) under[field] = value;
}

void MergeTraining(json& under, const json& over) {
  if (over.contains("lr") && over["lr"].is_number() && !over.contains("min_lr")) {
    const double before = under.at("lr");
    const double lr = over["lr"];
    under["min_lr"] = std::min(lr, under.at("min_lr").get<double>() * (lr / before));  // whatever rounding does
  }
  MergeFields(under, over);
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
        const bool only_here = top || !object.contains(key);  // else the line would be the other's
        throw formats::FormatError(
            path, LocatedMessage(only_here ? path : "", "unknown field " + formats::quote(key) +
                                                            ", expected model, training, task, compare, paper or about"));
      }
      CheckSection(path, key, value, top);
    }
  };
  check(object, true);
  if (object.contains("paper")) {
    check(object["paper"], false);
    if (paper) {
      for (const auto& [section, fields] : object["paper"].items()) {
        json& under = object[section];
        if (under.is_null()) under = json::object();
        MergeFields(under, fields);
      }
      if (object.contains("compare")) object["compare"].erase("learning_rates");  // what suits the small size
    }
    object.erase("paper");
  } else if (paper) {
    throw formats::FormatError(path, "has no published settings: the field paper is missing");
  }
  return object;
}

int64_t LineOf(std::string_view text, size_t offset) {
  return 1 + std::count(text.begin(), text.begin() + static_cast<std::ptrdiff_t>(std::min(offset, text.size())), '\n');
}

std::string LocatedMessage(const std::string& path, const std::string& message) {
  if (path.empty()) return message;
  try {
    const formats::MappedFile file(path);
    const auto [field, value] = SubjectOf(message, file.text());
    const auto section = RefusingSection(message);
    const auto at = section.empty() ? PlaceOf(file.text(), field, value) : PlaceInSection(file.text(), section, field);
    return at ? "line " + std::to_string(LineOf(file.text(), *at)) + ": " + message : message;
  } catch (const formats::FileError&) {  // gone meanwhile: the message is enough
    return message;
  }
}

bool IsTaskRun(const train::RunOptions& run) {
  const auto found = [&] {
    const std::string path = formats::checkpoint_path(run.out);
    if (!std::filesystem::is_regular_file(path)) return false;
    const json config = json::parse(formats::CheckpointFile(path).config(), nullptr, /*allow_exceptions=*/false);
    return config.is_object() && config.contains("task");
  };
  return run.ranks ? run.ranks->any(run.ranks->leads() && found()) : found();
}

std::string OtherRun(const train::RunOptions& run) {
  return formats::checkpoint_path(run.out) +
         " is of a run with other options: --overwrite starts again, --out names another folder";
}

bool Restarted(const train::RunOptions& run) {
  if (!run.ranks || run.ranks->restarts() == 0) return false;
  // What lay there before the job began isn't its own.
  const bool saved =
      run.ranks->leads() && std::filesystem::exists(formats::checkpoint_path(run.out)) && run.ranks->has_begun(run.out);
  return run.ranks->any(saved);
}

namespace {

// Fields that were asked for and that a checkpoint can't change.
void CheckSame(const json& asked, const json& found, const std::string& whose) {
  for (const auto& [field, value] : asked.items()) {
    if (!found.contains(field) || found.at(field) != value) {
      throw train::OptionError(field + " is " + formats::shown(value) + ", but the checkpoint's " + whose + " has " +
                               (found.contains(field) ? formats::shown(found.at(field)) : "none"));
    }
  }
}

train::RunResult ResumeTask(const TrainRequest& request, const train::RunOptions& run) {
  const auto record = train::read_task_record(run);
  json all = record.options.to_json();
  MergeTraining(all, request.training);
  CheckSame(request.model, record.model.to_json(), "model");
  CheckSame(request.task, record.task.to_json(), "task");
  return train::resume_task_run(train::TrainerOptions::from_json(all), run);
}

train::RunResult StartTask(const TrainRequest& request, train::RunOptions run) {
  json training = request.training;
  FillMinLr(training);
  const auto options = train::TrainerOptions::from_json(training);
  const auto task = TaskOptions::from_json(request.task);
  json fields = kDefaultEncoder;
  // The mean over a long sequence is nearly the same for all: without a norm what is left of it isn't learned from.
  const bool is_long = task.name == "text" || task.name == "retrieval" || task.name == "image" || task.name == "pathfinder";
  const bool by_mean = request.model.value("pooling", json("mean")) == "mean";
  if (!request.configured && is_long && by_mean && options.batch > 1) fields["pooled_norm"] = "batch";
  MergeFields(fields, request.model);
  for (const char* field : {"vocab_size", "num_outputs"}) {
    if (fields.contains(field)) throw train::OptionError(std::string(field) + " is the task's to say");
    fields[field] = 1;
  }
  const auto model = models::EncoderConfig::from_json(fields);
  if (run.out.empty()) run.out = "runs/" + task.name + "-" + model.attention;
  if (Restarted(run)) {
    const auto record = train::read_task_record(run);
    if (record.options == options && record.task.to_json() == task.to_json()) return ResumeTask(request, run);
    if (!run.overwrite) throw train::OptionError(OtherRun(run));
  }
  return train::start_task_run(model, fields.contains("max_positions"), options, task, run);
}

}  // namespace

train::RunResult TrainTask(const TrainRequest& request) {
  train::refuse_text_fields(request.training);
  return request.resume ? ResumeTask(request, request.run) : StartTask(request, request.run);
}

}  // namespace latte::cli
