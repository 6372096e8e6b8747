// dualpipe-plan: schedules on the command line. Needs no LibTorch.
#include <fcntl.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <exception>
#include <iostream>
#include <new>
#include <string>

#include "dualpipe/version.hpp"
#include "tools/plan/commands.hpp"
#include "tools/standard_streams.hpp"

namespace dualpipe::planner::tool {
namespace {

constexpr int bad_input = 1, bad_usage = 2;

int run(int argc, char** argv) {
  CLI::App app{
      "Pipeline schedules: draw them, prove them free of deadlock, lower them to what each rank does, simulate them.\n"
      "Example: dualpipe-plan show --schedule dualpipe --ranks 8 --microbatches 20",
      "dualpipe-plan"};
  app.set_version_flag("--version", "dualpipe-plan " DUALPIPE_VERSION);
  app.require_subcommand(1);
  app.failure_message([](const CLI::App*, const CLI::Error& error) {
    return std::string("dualpipe-plan: ") + error.what() + " (--help tells more)\n";
  });
  app.footer("Exit codes: 0 fine, 1 bad input (a schedule, a file, a value), 2 wrong usage.");
  for (const auto& add :
       {add_show, add_check, add_lower, add_simulate, add_compare, add_search, add_cost_file, add_report, add_plot})
    add(app);

  try {
    app.parse(argc, argv);
    return 0;
  } catch (const CLI::ParseError& error) {
    if (app.exit(error) != 0) return bad_usage;
    if (std::cout.flush()) return 0;
    std::fprintf(stderr, "dualpipe-plan: cannot write to standard output\n");
  } catch (const std::bad_alloc&) {
    std::fprintf(stderr, "dualpipe-plan: out of memory\n");
  } catch (const std::exception& error) {
    std::fprintf(stderr, "dualpipe-plan: %s\n", error.what());
  }
  return bad_input;
}

}  // namespace
}  // namespace dualpipe::planner::tool

int main(int argc, char** argv) {
  if (!dualpipe::open_standard_streams(O_RDONLY)) return 1;
  return dualpipe::planner::tool::run(argc, argv);
}
