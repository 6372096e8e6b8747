#include "tools/plan/options.hpp"

#include <cstddef>
#include <iterator>

#include "dualpipe/error.hpp"
#include "dualpipe/schedule/check.hpp"
#include "dualpipe/schedule/load.hpp"

namespace dualpipe::planner::tool {

std::string kinds() { return detail::joined_schedule_kinds(); }

Schedule unchecked_schedule(const ScheduleSpec& spec) {
  if (is_schedule_kind(spec.kind)) {
    if (spec.num_ranks == 0 || spec.num_micro_batches == 0)
      throw CLI::ValidationError("--schedule " + spec.kind, "needs --ranks and --microbatches");
    return make_schedule(spec);
  }
  Schedule schedule = load_schedule({.kind = spec.kind});
  const auto matches = [&](int asked, std::ptrdiff_t found, const char* what) {
    DUALPIPE_CHECK(asked == 0 || asked == found, spec.kind, " has ", found, " ", what, ", not ", asked);
  };
  matches(spec.num_ranks, std::ssize(schedule.ranks), "ranks");
  matches(spec.num_micro_batches, schedule.num_micro_batches, "micro-batches");
  return schedule;
}

Schedule schedule(const ScheduleSpec& spec) {
  Schedule result = unchecked_schedule(spec);
  check(result);
  return result;
}

void add_schedule(CLI::App& command, ScheduleSpec& spec) {
  command.add_option("schedule,--schedule", spec.kind, "kind (" + kinds() + ") or a CSV file")->capture_default_str();
  command.add_option("--ranks", spec.num_ranks, "number of ranks; a CSV file has its own")->check(CLI::PositiveNumber);
  command.add_option("--microbatches", spec.num_micro_batches, "micro-batches per step, both directions together")
      ->check(CLI::PositiveNumber);
  command.add_option("--chunks", spec.chunks_per_rank, "stages on each rank (interleaved)")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
}

void add_publish(CLI::App& command, Publish& publish) {
  command
      .add_option_function<std::string>(
          "--publish",
          [&publish](const std::string& when) { publish = when == "early" ? Publish::early : Publish::atomic; },
          "when results leave a step: early, before its weight part, or atomic, at its end (default: early)")
      ->check(CLI::IsMember({"early", "atomic"}).description(""))
      ->option_text("early|atomic");
}

void add_output(CLI::App& command, OutputOptions& output, const std::vector<std::string>& formats) {
  if (formats.size() > 1) {
    std::string all;
    for (const std::string& format : formats) all += (all.empty() ? "" : "|") + format;
    command.add_option("--format", output.format, "what to print (default: " + formats.front() + ")")
        ->check(CLI::IsMember(formats).description(""))
        ->option_text(all);
  }
  command.add_option("-o,--output", output.path, "write to this file instead of standard output")->option_text("FILE");
}

}  // namespace dualpipe::planner::tool
