// The commands of latte-torch: each adds its subcommand to the program; its callback leaves the exit code in `exit_code`.
#pragma once

#include <CLI/CLI.hpp>

namespace latte::cli {

void AddTrain(CLI::App& app, int& exit_code);
void AddCompare(CLI::App& app, int& exit_code);
void AddExtend(CLI::App& app, int& exit_code);
void AddEval(CLI::App& app, int& exit_code);
void AddVerify(CLI::App& app, int& exit_code);
void AddBench(CLI::App& app, int& exit_code);

}  // namespace latte::cli
