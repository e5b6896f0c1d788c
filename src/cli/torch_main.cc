// The program latte-torch: the commands of latte that need libtorch. `latte` runs it; it is named latte in all it says.
#include <c10/util/Exception.h>

#include <csignal>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>

#include "cli/fail.h"
#include "cli/memory_limit.h"
#include "cli/shortened_file.h"
#include "cli/torch_commands.h"
#include "train/memory_error.h"

namespace {

using latte::cli::Fail;

constexpr int kUsageError = 2;

int FailForMemory(std::optional<uint64_t> allowed) {
  std::string message = "out of memory";
  if (allowed) message += ": " + std::to_string(*allowed >> 20) + " MB could be had when it began";
  return Fail(message + "; smaller sizes need less (tokens a step or a stretch, model)", 1);
}

int Run(int argc, char** argv) {
  int exit_code = 0;
  CLI::App app("Latent attention: linear-time training, constant-cost decoding.", "latte");
  app.set_version_flag("--version", "latte " LATTE_VERSION);
  app.require_subcommand(1);
  latte::cli::AddTrain(app, exit_code);
  latte::cli::AddCompare(app, exit_code);
  latte::cli::AddExtend(app, exit_code);
  latte::cli::AddEval(app, exit_code);
  latte::cli::AddVerify(app, exit_code);
  latte::cli::AddBench(app, exit_code);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == static_cast<int>(CLI::ExitCodes::Success)) return app.exit(error);  // --help, --version
    return Fail(std::string(error.what()) + " (--help explains)", kUsageError);
  }
  return exit_code;
}

}  // namespace

int main(int argc, char** argv) {
  // A limit on file sizes becomes an error that is reported, as a full disk is.
  std::signal(SIGXFSZ, SIG_IGN);
  latte::cli::ExplainShortenedFiles();
  std::optional<uint64_t> allowed;
  try {
    allowed = latte::cli::LimitMemory();
  } catch (const std::invalid_argument& error) {
    return Fail(error.what(), kUsageError);
  }
  try {
    const int exit_code = Run(argc, argv);
    // What was printed may have been lost, or still be lost now, where a disk is full.
    const bool lost = std::fflush(stdout) != 0 || std::ferror(stdout) != 0;
    return lost && exit_code == 0 ? Fail("cannot write standard output", 1) : exit_code;
  } catch (const c10::Error& error) {
    const std::string message = error.what_without_backtrace();
    return latte::train::tells_of_memory(message) ? FailForMemory(allowed) : Fail(message, 1);
  } catch (const std::bad_alloc&) {
    return FailForMemory(allowed);
  } catch (const std::exception& error) {
    return latte::train::tells_of_memory(error.what()) ? FailForMemory(allowed) : Fail(error.what(), 1);
  }
}
