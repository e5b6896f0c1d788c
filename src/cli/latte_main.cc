// The program latte: without libtorch. Commands that need it live in latte-torch, which takes this process's place.
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <filesystem>
#include <new>
#include <numeric>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cli/fail.h"
#include "cli/latte_commands.h"
#include "cli/shortened_file.h"

namespace {

using latte::cli::Fail;

constexpr int kUsageError = 2;

struct Command {
  std::string_view name;
  std::string_view summary;
};

// In the order of the help.
constexpr std::array kCommands = {
    Command{"train", "Train a language model on a text, or an encoder on a task"},
    Command{"compare", "Train several attentions alike and compare them"},
    Command{"generate", "Write text with a model"},
    Command{"chat", "Talk with a pretrained model"},
    Command{"inspect", "Show what a model's file holds"},
    Command{"extend", "Turn a pretrained model into a linear-time one"},
    Command{"eval", "Compare a pretrained model's attention on long texts"},
    Command{"perplexity", "Measure how well a pretrained model predicts a text"},
    Command{"tokenize", "Turn texts into a pretrained model's tokens, to train on"},
    Command{"quantize", "Bring a model's matrices to another type"},
    Command{"verify", "Check this machine's kernels against reference files"},
    Command{"bench", "Measure attention against torch's, decoding against llama.cpp's"},
};

void PrintHelp() {
  std::puts("Latent attention: linear-time training, constant-cost decoding.\n\nUsage: latte COMMAND [OPTIONS]\n\nCommands:");
  for (const Command& command : kCommands) {
    std::printf("  %-10s %s\n", std::string(command.name).c_str(), std::string(command.summary).c_str());
  }
  std::puts(
      "\nOptions:\n  --help     This; `latte COMMAND --help` explains a command\n  --version  The version\n\n"
      "Examples:\n  latte train --text data/tinyshakespeare.txt --out runs/demo\n"
      "  latte generate runs/demo --prompt ROMEO:\n"
      "  latte inspect SmolLM2-135M-Instruct.Q4_1.gguf");
}

// Levenshtein's, one row at a time.
size_t EditDistance(std::string_view a, std::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), size_t{0});
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = std::exchange(row[0], i);
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t replaced = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({replaced, row[j] + 1, row[j - 1] + 1});
    }
  }
  return row.back();
}

int Reject(std::string_view name) {
  constexpr size_t kLongest = 64;  // a longer word is no slip of the finger
  std::string shown(name.substr(0, kLongest));
  std::replace_if(
      shown.begin(), shown.end(), [](unsigned char c) { return c < 0x20 || c == 0x7F; }, '?');
  const bool option = name.starts_with("-");
  std::string message = "latte: error: unknown " + std::string(option ? "option " : "command ") + shown;
  const auto distance = [&](const Command& command) { return EditDistance(shown, command.name); };
  const auto nearest = std::min_element(kCommands.begin(), kCommands.end(),
                                        [&](const Command& a, const Command& b) { return distance(a) < distance(b); });
  if (!option && distance(*nearest) <= 2) message += "; did you mean " + std::string(nearest->name) + "?";
  std::fprintf(stderr, "%s (latte --help lists the commands)\n", message.c_str());
  return kUsageError;
}

// Returns only where latte-torch can't be run.
int RunTorch(std::string_view name, char** argv) {
  std::error_code error;
  const auto program = std::filesystem::read_symlink("/proc/self/exe", error);
  const auto folder = error ? std::filesystem::path(argv[0]).parent_path() : program.parent_path();
  const std::filesystem::path places[] = {folder / "latte-torch", folder / ".." / "bin" / "latte-torch"};
  for (const auto& place : places) {
    if (!std::filesystem::exists(place, error)) continue;
    // Training writes its activations anew in every step. The allocator keeps their memory: given back and asked for again, every
    // page would be cleared by the kernel first, a sixth of a step's time. It reads this at its start.
    if (name == "train" || name == "compare" || name == "extend") {
      ::setenv("GLIBC_TUNABLES",
               "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776:glibc.malloc.top_pad=268435456",
               /*overwrite=*/0);
    }
    ::execv(place.c_str(), argv);
    std::fprintf(stderr, "latte: error: cannot run %s: %s\n", place.c_str(), std::strerror(errno));
    return 1;
  }
  std::fprintf(stderr, "latte: error: latte-torch isn't beside latte, and %s needs it: build with -DLATTE_TORCH=ON\n", argv[1]);
  return 1;
}

// The commands that live in this program.
int RunHere(int argc, char** argv) {
  std::signal(SIGXFSZ, SIG_IGN);  // a limit on file sizes becomes an error that is reported, as a full disk is
  latte::cli::ExplainShortenedFiles();
  int exit_code = 0;
  CLI::App app("Latent attention: linear-time training, constant-cost decoding.", "latte");
  app.require_subcommand(1);
  latte::cli::AddInspect(app, exit_code);
  CLI::App* bench = app.add_subcommand("bench", "Measure");
  bench->require_subcommand(1);
  // For --help: latte-torch runs it.
  bench->add_subcommand("attention", "Latent attention beside torch's scaled_dot_product_attention");
  bench->add_subcommand("distributed", "What training on several ranks sends and waits for, and how that scales");
  latte::cli::AddBenchDecode(*bench, exit_code);
  latte::cli::AddGenerate(app, exit_code);
  latte::cli::AddChat(app, exit_code);
  latte::cli::AddPerplexity(app, exit_code);
  latte::cli::AddQuantize(app, exit_code);
  latte::cli::AddTokenize(app, exit_code);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == static_cast<int>(CLI::ExitCodes::Success)) return app.exit(error);  // --help
    return Fail(std::string(error.what()) + " (--help explains)", kUsageError);
  } catch (const std::bad_alloc&) {
    return Fail("out of memory", 1);
  } catch (const std::exception& error) {
    return Fail(error.what(), 1);
  }
  // What was printed may have been lost, or still be lost now, where a disk is full.
  const bool lost = std::fflush(stdout) != 0 || std::ferror(stdout) != 0;
  return lost && exit_code == 0 ? Fail("cannot write standard output", 1) : exit_code;
}

bool LivesHere(int argc, char** argv) {
  const std::string_view name = argv[1];
  if (name == "bench") {
    const std::string_view which = argc > 2 ? argv[2] : "--help";
    return which == "decode" || which == "--help" || which == "-h";
  }
  constexpr std::string_view kHere[] = {"inspect", "generate", "chat", "perplexity", "quantize", "tokenize"};
  return std::find(std::begin(kHere), std::end(kHere), name) != std::end(kHere);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    PrintHelp();
    return kUsageError;
  }
  const std::string_view name = argv[1];
  if (name == "--help" || name == "-h" || name == "help") return PrintHelp(), 0;
  if (name == "--version") return std::puts("latte " LATTE_VERSION), 0;
  if (LivesHere(argc, argv)) return RunHere(argc, argv);
  for (const Command& command : kCommands) {
    if (name == command.name) return RunTorch(name, argv);
  }
  return Reject(name);
}
