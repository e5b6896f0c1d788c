#include "train/run.h"

#include <ATen/Parallel.h>

#include <cerrno>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "data/text.h"
#include "formats/atomic_file.h"
#include "formats/error.h"
#include "train/progress.h"
#include "train/run_folder.h"
#include "train/run_loop.h"
#include "train/trainer.h"

namespace latte::train {
namespace {

TextCorpusOptions corpus_options(const TrainerOptions& options) {
  return {.kind = options.vocabulary_kind(),
          .vocabulary = {},
          .validation_fraction = options.validation_fraction,
          .test_fraction = options.test_fraction,
          .context = options.context};
}

// `before` on this machine, with this text.
Progress progress_of(const Trainer& trainer, const TextCorpus& corpus, Progress before) {
  before.threads = at::get_num_threads();
  before.dtype = trainer.dtype();
  before.train_tokens = corpus.size(Split::kTrain);
  before.validation_tokens = corpus.size(Split::kValidation);
  return before;
}

// What `latte train --config` takes, to do the same again.
void write_config(const RunFolder& folder, const formats::LanguageModelConfig& model, const TrainerOptions& options,
                  formats::FileOperations& files) {
  nlohmann::json object = {{"model", model.to_json()}, {"training", options.to_json()}};
  object["model"].erase("vocab_size");
  formats::write_file(folder / "config.json", dump(object), files);
}

}  // namespace

RunResult start_run(const formats::LanguageModelConfig& model, const TrainerOptions& options, const RunOptions& run) {
  options.validate();
  refuse_to_overwrite(run);
  const TextCorpus corpus(options.text, corpus_options(options));
  formats::LanguageModelConfig sized = model;
  sized.vocab_size = corpus.vocabulary().size();
  Trainer trainer(sized, options, corpus, run.ranks);
  const Progress progress = progress_of(trainer, corpus, {});
  if (!leads(run)) return run_loop(trainer, nullptr, progress, run);

  // Only now, when everything that could be wrong was read, does anything change on the disk.
  // The untrained model takes the place of the run that --overwrite gives up first of all: what can't be written is noticed at
  // once, and costs that run nothing.
  const RunFolder folder(run.out);
  trainer.save(folder.checkpoint(), progress, *run.files);
  write_config(folder, sized, options, *run.files);
  return run_loop(trainer, &folder, progress, run);
}

TrainingRecord read_record(const RunOptions& run) {
  const std::string path = checkpoint_of(run);
  std::string config;
  if (leads(run)) config = formats::CheckpointFile(path).config();
  if (run.ranks) config = run.ranks->broadcast(config);
  return TrainingRecord::from_json(path, config);
}

RunResult resume_run(const TrainerOptions& options, const RunOptions& run) {
  options.validate();
  const std::string path = checkpoint_of(run);
  if (leads(run) && !std::filesystem::exists(path)) throw formats::FileError("resume from", path, ENOENT);
  std::optional<RunFolder> folder;
  std::optional<formats::CheckpointFile> checkpoint;
  if (leads(run)) {
    folder.emplace(run.out);
    checkpoint.emplace(path);
  }
  std::string config = checkpoint ? checkpoint->config() : "";
  if (run.ranks) config = run.ranks->broadcast(config);
  const TrainingRecord record = TrainingRecord::from_json(path, config);
  const ResumedRun resumed = {.checkpoint = checkpoint ? &*checkpoint : nullptr,
                              .options = record.options,
                              .progress = record.progress,
                              .parameters = record.model.parameter_count(),
                              .tests = record.options.test_fraction > 0};
  if (const auto finished = finished_run(resumed, options, run)) return *finished;
  if (options.vocabulary_kind() != record.vocabulary.kind()) {
    throw OptionError("tokens is " + options.tokens + ", but the checkpoint was trained on " + record.options.tokens);
  }
  TextCorpusOptions corpus_settings = corpus_options(options);
  corpus_settings.vocabulary = record.vocabulary;
  const TextCorpus corpus(options.text, corpus_settings);
  if (!checkpoint) {
    Trainer trainer(record.model, options, corpus, run.ranks);
    return run_loop(trainer, nullptr, progress_of(trainer, corpus, record.progress), run);
  }
  Trainer trainer(*checkpoint, options, corpus, run.ranks);

  ProgressLine notes(0, 0, run.quiet);
  if (corpus.size(Split::kTrain) != record.progress.train_tokens ||
      corpus.size(Split::kValidation) != record.progress.validation_tokens) {
    notes.note("latte: the text has changed since the checkpoint: the run goes on with the new one");
  }
  note_threads(record.progress, run);
  write_config(*folder, record.model, options, *run.files);
  Progress progress = progress_of(trainer, corpus, record.progress);
  // A checkpoint from before progress counted them.
  if (progress.tokens == 0) progress.tokens = checkpoint->step() * record.options.tokens_per_step();
  return run_loop(trainer, &*folder, progress, run);
}

}  // namespace latte::train
