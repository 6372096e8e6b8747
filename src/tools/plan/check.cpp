#include <CLI/CLI.hpp>
#include <cstddef>
#include <memory>
#include <string>

#include "dualpipe/error.hpp"
#include "dualpipe/schedule/check.hpp"
#include "dualpipe/schedule/lower.hpp"
#include "tools/plan/commands.hpp"
#include "tools/plan/files.hpp"
#include "tools/plan/options.hpp"
#include "tools/plan/print.hpp"

namespace dualpipe::planner::tool {
namespace {

struct CheckOptions {
  ScheduleSpec schedule;
  Publish publish = Publish::early;
  OutputOptions output;
};

std::string check_and_describe(const CheckOptions& options) {
  const Schedule plan = unchecked_schedule(options.schedule);
  const std::vector<Violation> found = violations(plan);
  if (!found.empty()) {
    std::string message;
    try {
      check(plan);  // shows the first in its surroundings
    } catch (const InvalidArgument& error) {
      message = error.what();
    }
    message.erase(message.find_last_not_of('\n') + 1);
    if (found.size() > 1) message += "\nfurther findings:";
    for (std::size_t i = 1; i < found.size(); ++i) message += "\n  " + to_string(found[i]);
    throw InvalidArgument(message);
  }
  const Program program = lower(plan, options.publish);
  dry_run(program);
  std::size_t steps = 0;
  for (const auto& rank : plan.ranks) steps += rank.size();
  return detail::str("valid: ", describe(plan), ", ", steps, " steps, ", program.order.size(),
                     " transfers; finishes with one transfer at a time per rank\n");
}

}  // namespace

void add_check(CLI::App& app) {
  CLI::App& command =
      *app.add_subcommand("check", "prove that a schedule is complete, in order and free of deadlock: check FILE.csv");
  auto options = std::make_shared<CheckOptions>();
  add_schedule(command, options->schedule);
  add_publish(command, options->publish);
  add_output(command, options->output, {});
  command.callback([options] { write_output(check_and_describe(*options), options->output.path); });
}

}  // namespace dualpipe::planner::tool
