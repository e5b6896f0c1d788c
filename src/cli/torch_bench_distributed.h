#pragma once

#include <CLI/CLI.hpp>

namespace latte::cli {

// A subcommand of bench.
void AddBenchDistributed(CLI::App& bench, int& exit_code);

}  // namespace latte::cli
