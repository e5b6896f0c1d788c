// The commands of latte that need no libtorch: each adds its subcommand to the program; its callback leaves the exit code in
// `exit_code`.
#pragma once

#include <CLI/CLI.hpp>

namespace latte::cli {

void AddInspect(CLI::App& app, int& exit_code);
void AddBenchDecode(CLI::App& bench, int& exit_code);
void AddGenerate(CLI::App& app, int& exit_code);
void AddChat(CLI::App& app, int& exit_code);
void AddPerplexity(CLI::App& app, int& exit_code);
void AddTokenize(CLI::App& app, int& exit_code);
void AddQuantize(CLI::App& app, int& exit_code);

}  // namespace latte::cli
