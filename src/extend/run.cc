#include "extend/run.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <stdexcept>

#include "formats/atomic_file.h"
#include "formats/error.h"
#include "formats/hash.h"
#include "formats/tokenizer.h"
#include "train/interrupt.h"
#include "train/metrics.h"
#include "train/plot.h"
#include "train/progress.h"
#include "train/run_folder.h"
#include "train/training_checkpoint.h"

namespace latte::extend {
namespace {

using Clock = std::chrono::steady_clock;
using nlohmann::json;
using train::InterruptGuard;

// At the end of a layer, or of a step, that comes so long after the last save.
constexpr double kSecondsBetweenMatchSaves = 60.0;
constexpr double kSecondsBetweenSaves = 180.0;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

std::string folder_of(const std::string& out) { return out + ".run"; }
std::string checkpoint_of(const std::string& out) {
  return (std::filesystem::path(folder_of(out)) / formats::kCheckpointName).string();
}

// What a checkpoint says beside its tensors.
struct Record {
  ExtendOptions options;
  std::string base_hash;
  std::optional<std::string> from_hash;  // of options.from, "" where there is none; runs of before it was told have none
  bool matched = false;
  int64_t matched_layers = 0;  // the first ones, while matching isn't done
  double seconds = 0.0, match_seconds = 0.0;
  std::optional<Validation> window_sinks, matched_loss;

  std::string to_json() const {
    const auto losses = [](const std::optional<Validation>& loss) {
      return loss ? json{{"kl", loss->kl}, {"next_token", loss->next_token}} : json(nullptr);
    };
    return json{{"extend", options.to_json()},
                {"base_hash", base_hash},
                {"from_hash", from_hash ? json(*from_hash) : json(nullptr)},
                {"matched", matched},
                {"matched_layers", matched_layers},
                {"seconds", seconds},
                {"match_seconds", match_seconds},
                {"window_sinks", losses(window_sinks)},
                {"matched_loss", losses(matched_loss)}}
        .dump(-1, ' ', false, json::error_handler_t::replace);
  }

  static Record from(const formats::CheckpointFile& checkpoint) {
    const std::string& path = checkpoint.file().path();
    const auto losses = [](const json& value) -> std::optional<Validation> {
      if (value.is_null()) return std::nullopt;
      return Validation{value.at("kl").get<double>(), value.at("next_token").get<double>()};
    };
    try {
      const json object = json::parse(checkpoint.config());
      Record record;
      record.options = ExtendOptions::from_recipe(object.at("extend"));
      record.base_hash = object.at("base_hash").get<std::string>();
      if (const auto found = object.find("from_hash"); found != object.end() && found->is_string()) record.from_hash = *found;
      record.matched = object.at("matched").get<bool>();
      record.matched_layers = std::max<int64_t>(0, object.value("matched_layers", int64_t{0}));
      record.seconds = object.at("seconds").get<double>();
      record.match_seconds = object.at("match_seconds").get<double>();
      record.window_sinks = losses(object.at("window_sinks"));
      record.matched_loss = losses(object.at("matched_loss"));
      return record;
    } catch (const json::exception&) {
      throw formats::FormatError(path, "config isn't one of latte extend: " + formats::quote(checkpoint.config()));
    } catch (const OptionError& error) {
      throw formats::FormatError(path, error.what());
    }
  }
};

class Run {
 public:
  Run(const ExtendOptions& options, const RunOptions& run)
      : options_(options),
        run_(run),
        base_(options.model),
        text_(options.text, formats::Tokenizer(base_.metadata()), options.held_out_fraction, options.context),
        trainer_(options, text_) {
    record_.options = options;
    record_.base_hash = trainer_.spec().base_hash;
    record_.from_hash = options.from.empty() ? "" : formats::hash_of_file(options.from);
  }

  void resume(const formats::CheckpointFile& checkpoint, Record record) {
    if (record.base_hash != record_.base_hash) {
      throw formats::FormatError(checkpoint.file().path(), "made from another model than " + options_.model);
    }
    const bool same_start = record.from_hash ? record.from_hash == record_.from_hash : record.options.from == options_.from;
    if (!same_start) {
      throw OptionError("from is " + formats::quote(options_.from) + ", but the run began with " +
                        (record.options.from.empty() ? "none" : "another, named " + formats::quote(record.options.from)));
    }
    trainer_.load(checkpoint);
    record.options = options_;
    record.from_hash = record_.from_hash;
    record_ = std::move(record);
  }

  Report go(const train::RunFolder& folder) {
    folder_ = &folder;
    const InterruptGuard interrupt;
    train::MetricsLog log(folder / "metrics.jsonl", trainer_.steps_done());
    if (!record_.matched) match();
    if (!interrupted()) train(log);
    return finish();
  }

 private:
  static bool interrupted() { return InterruptGuard::interrupted(); }

  void note(const std::string& text) const { train::ProgressLine(0, 0, run_.quiet).note(text); }

  void match() {
    if (trainer_.has_validation() && !record_.window_sinks) {
      record_.window_sinks = trainer_.validate(/*latents_off=*/true);
      note("held-out KL " + shown(record_.window_sinks->kl) + " before training, with " +
           (options_.attention == "full" ? "full attention" : "window and sinks alone"));
    }
    const auto start = Clock::now();
    const double before = record_.match_seconds;
    double saved = 0.0;  // when
    const auto count_seconds = [&] { record_.match_seconds = record_.seconds = before + seconds_since(start); };
    std::optional<train::ProgressLine> line;
    MatchWatch watch;
    watch.progress = [&](int64_t done, int64_t total) {
      if (!line) line.emplace(0, total, run_.quiet);
      line->update(done, "matching");
      return !interrupted();
    };
    watch.layer = [&](const MatchResult& result) {
      if (line) line->finish();
      report_.layers.push_back(result);
      note("layer " + std::to_string(result.layer) + ": " + shown(100 * result.far_share) +
           "% of attention beyond window and sinks; error " + shown(result.window_error) + " -> " + shown(result.error));
      record_.matched_layers = result.layer + 1;
      if (seconds_since(start) - saved > kSecondsBetweenMatchSaves) {
        count_seconds();
        trainer_.save(folder_->checkpoint(), record_.to_json());
        saved = seconds_since(start);
      }
      return !interrupted();
    };
    trainer_.match(watch, record_.matched_layers);
    count_seconds();
    record_.matched = !interrupted();
    if (!record_.matched) return trainer_.save(folder_->checkpoint(), record_.to_json());
    if (trainer_.has_validation() && record_.matched_layers > 0) {
      record_.matched_loss = trainer_.validate();
      note("held-out KL " + shown(record_.matched_loss->kl) + " after matching");
    }
    save();
  }

  void train(train::MetricsLog& log) {
    const int64_t steps = options_.steps();
    const int64_t tokens_a_step = options_.context * options_.batch;
    train::ProgressLine line(trainer_.steps_done(), steps, run_.quiet);
    auto saved = Clock::now();
    while (trainer_.steps_done() < steps && !interrupted()) {
      const auto start = Clock::now();
      const StepResult step = trainer_.step();
      const double seconds = seconds_since(start);
      if (!std::isfinite(step.loss) || !std::isfinite(step.grad_norm)) {
        throw std::runtime_error("the loss or its gradient isn't finite at step " + std::to_string(trainer_.steps_done() + 1) +
                                 ": lower learning rates or float32 may help");
      }
      record_.seconds += seconds;
      train::StepMetrics metrics;
      metrics.step = trainer_.steps_done();
      metrics.loss = step.loss;
      metrics.lr = step.lr;
      metrics.grad_norm = step.grad_norm;
      metrics.tokens = metrics.step * tokens_a_step;
      metrics.tokens_per_second = static_cast<double>(tokens_a_step) / std::max(seconds, 1e-9);
      metrics.time = record_.seconds;
      const auto due = [&](int64_t every) { return metrics.step == steps || (every > 0 && metrics.step % every == 0); };
      if (trainer_.has_validation() && due(options_.eval_every)) metrics.val_loss = trainer_.validate().kl;
      log.append(metrics);
      line.update(metrics);
      const bool late = options_.save_every > 0 && seconds_since(saved) > kSecondsBetweenSaves;
      if (interrupted() || due(options_.save_every) || late) {
        save();
        saved = Clock::now();
      }
    }
  }

  void save() {
    trainer_.save(folder_->checkpoint(), record_.to_json());
    write_adapter();
  }

  void write_adapter() {
    const StoredTensors stored = trainer_.adapter_tensors();
    formats::AdapterSpec spec = trainer_.spec();
    // An adapter is passed on: of files it tells the names, not where they lay.
    ExtendOptions named = options_;
    for (std::string* path : {&named.model, &named.from, &named.teacher_cache})
      *path = std::filesystem::path(*path).filename().string();
    for (std::string& path : named.text) path = std::filesystem::path(path).filename().string();
    json recipe = named.to_json();
    recipe["steps_done"] = trainer_.steps_done();
    recipe["tokens_done"] = trainer_.steps_done() * options_.context * options_.batch;
    spec.recipe = recipe.dump(-1, ' ', false, json::error_handler_t::replace);
    formats::write_adapter(run_.out, spec, base_, stored.tensors());
    report_.adapter_bytes = static_cast<int64_t>(std::filesystem::file_size(run_.out));
    if (!run_.merged.empty() && trainer_.steps_done() >= options_.steps()) {
      formats::write_merged(run_.merged, spec, base_, stored.tensors());
    }
  }

  Report finish() {
    report_.interrupted = interrupted();
    report_.matching = report_.interrupted && !record_.matched;
    report_.matched_layers = record_.matched_layers;
    report_.step = trainer_.steps_done();
    report_.steps = options_.steps();
    report_.tokens = report_.step * options_.context * options_.batch;
    report_.seconds = record_.seconds;
    report_.match_seconds = record_.match_seconds;
    const double trained = record_.seconds - record_.match_seconds;
    report_.tokens_per_second = trained > 0 ? static_cast<double>(report_.tokens) / trained : 0.0;
    report_.parameters = trainer_.trained_parameters();
    report_.out = run_.out;
    report_.full = options_.attention == "full";
    report_.window_sinks = record_.window_sinks;
    report_.matched = record_.matched_loss;
    if (!report_.interrupted) {
      if (report_.adapter_bytes == 0) save();  // a resumed run that had nothing left to do
      if (trainer_.has_validation()) {
        report_.trained = trainer_.validate();
        if (options_.attention == "macchiato") report_.latents_off = trainer_.validate(/*latents_off=*/true);
      }
      if (report_.step > 0) {
        const std::string problem =
            train::plot_losses({{folder_->name(), train::read_metrics(*folder_ / "metrics.jsonl")}}, *folder_ / "loss");
        if (!problem.empty()) note("latte: " + problem);
      }
    }
    return report_;
  }

  static std::string shown(double value) {
    char text[32];
    std::snprintf(text, sizeof text, "%.4g", value);
    return text;
  }

  const ExtendOptions& options_;
  const RunOptions& run_;
  const train::RunFolder* folder_ = nullptr;  // of go()
  formats::GgufFile base_;
  TokenText text_;
  ExtendTrainer trainer_;
  Record record_;
  Report report_;
};

// What is written must not take the place of what is read, or of what else is written.
void require_files_of_their_own(const ExtendOptions& options, const RunOptions& run) {
  const auto same = [](const std::string& a, const std::string& b) {
    // What doesn't exist keeps its dots while it is relative.
    const auto whole = [](const std::string& path) {
      std::error_code ignored;
      return std::filesystem::weakly_canonical(std::filesystem::absolute(path, ignored), ignored);
    };
    return whole(a) == whole(b);
  };
  std::vector<std::pair<std::string, std::string>> taken = {
      {"model", options.model}, {"from", options.from}, {"config", run.config}};
  for (const std::string& text : options.text) taken.emplace_back("text", text);
  for (const auto& [name, path] : {std::pair("out", run.out), std::pair("merged", run.merged)}) {
    if (path.empty()) continue;
    for (const auto& [what, other] : taken) {
      if (!other.empty() && same(path, other))
        throw OptionError(std::string(name) + " is " + path + ", which is " + what + " too");
    }
    taken.emplace_back(name, path);
  }
}

void refuse_to_overwrite(const RunOptions& run) {
  if (run.overwrite) return;
  for (const std::string& path : {run.out, checkpoint_of(run.out), run.merged}) {
    if (path.empty() || !std::filesystem::exists(path)) continue;
    throw OptionError(path +
                      " is there already: --resume goes on with a run, --overwrite starts again, --out names another file");
  }
}

// A file that is only written at the end can be: said now, not after hours of training.
void require_writable(const std::string& path) {
  if (!path.empty()) formats::AtomicFile(path).abandon();
}

// Layers that are matched were matched with these.
void require_same_matching(const ExtendOptions& asked, const ExtendOptions& found) {
  const json ours = asked.to_json(), theirs = found.to_json();
  for (const char* field : {"from", "text", "match_layers", "match_sequences", "match_steps", "match_share", "match_open",
                            "context", "seed", "least_window", "dtype", "held_out_fraction"}) {
    if (ours.at(field) != theirs.at(field)) {
      throw OptionError(std::string(field) + " is " + ours.at(field).dump() + ", but some layers are matched already, with " +
                        theirs.at(field).dump());
    }
  }
}

void require_same_model(const ExtendOptions& asked, const ExtendOptions& found) {
  const json ours = asked.to_json(), theirs = found.to_json();
  for (const char* field : {"attention", "window", "sinks", "latents", "layer_latents", "far_limit", "forget", "floor",
                            "position", "evicted", "train", "lora_rank", "match_layers"}) {
    if (std::string_view(field) == "match_layers" && found.from.empty()) continue;  // here they tell what was made anew
    if (ours.at(field) != theirs.at(field)) {
      throw OptionError(std::string(field) + " is " + ours.at(field).dump() + ", but the checkpoint's is " +
                        theirs.at(field).dump());
    }
  }
}

}  // namespace

Report run_extend(const ExtendOptions& options, const RunOptions& run) {
  options.validate();
  require_files_of_their_own(options, run);
  refuse_to_overwrite(run);
  require_writable(run.merged);
  Run session(options, run);  // whatever is wrong with the files shows here, before a folder is made or a checkpoint goes
  const train::RunFolder folder(folder_of(run.out));
  refuse_to_overwrite(run);  // nor what another process made meanwhile
  require_writable(run.out);
  std::error_code ignored;
  std::filesystem::remove(folder.checkpoint(), ignored);
  return session.go(folder);
}

Report resume_extend(const ExtendOptions& options, const RunOptions& run) {
  options.validate();
  const std::string path = checkpoint_of(run.out);
  if (!std::filesystem::exists(path)) throw formats::FileError("resume from", path, ENOENT);
  const train::RunFolder folder(folder_of(run.out));
  const formats::CheckpointFile checkpoint(path);
  Record record = Record::from(checkpoint);
  require_same_model(options, record.options);
  if (!record.matched && record.matched_layers > 0) require_same_matching(options, record.options);
  require_files_of_their_own(options, run);
  require_writable(run.merged);
  Run session(options, run);
  session.resume(checkpoint, std::move(record));
  return session.go(folder);
}

ExtendOptions options_of_run(const std::string& out) { return Record::from(formats::CheckpointFile(checkpoint_of(out))).options; }

}  // namespace latte::extend
