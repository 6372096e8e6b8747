// Schedules from CSV: what is read is written back the same, what is found valid runs, what is refused is located.
#include <vector>

#include "dualpipe/error.hpp"
#include "dualpipe/schedule/check.hpp"
#include "dualpipe/schedule/lower.hpp"
#include "dualpipe/schedule/schedule.hpp"
#include "dualpipe/schedule/simulate.hpp"
#include "fuzz/target.hpp"

namespace dualpipe::fuzz {
namespace {

void require_located(const std::string& message) {
  require_readable(message);
  const bool located = message.starts_with("row ") && message.find(", cell ") != std::string::npos;
  require(located || message.starts_with("the text of schedule"), "a refusal names row and cell: " + message);
}

void run(const Schedule& schedule) {
  for (const Publish publish : {Publish::early, Publish::atomic}) {
    simulate(schedule, {.send = 0.5}, publish);
    dry_run(lower(schedule, publish));
    dry_run(lower(schedule, publish, {}, /*num_replicas=*/2));
  }
  dry_run(lower(forward_only(schedule, schedule.num_micro_batches + 1)));
  for (const int fewer : {1, (schedule.num_micro_batches + 1) / 2})
    dry_run(lower(with_fewer(schedule, fewer), Publish::early, {}, /*num_replicas=*/2, &schedule));
}

}  // namespace

void read(std::string_view text) {
  Schedule schedule;
  try {
    schedule = from_csv(text);
  } catch (const InvalidArgument& error) {
    return require_located(error.what());
  }
  require(from_csv(to_csv(schedule)) == schedule, "what was read is written so that it is read the same");
  const std::vector<Violation> found = violations(schedule);
  for (const Violation& violation : found) require_readable(violation.message);
  try {
    check(schedule);
    require(found.empty(), "check throws where there are findings");
  } catch (const InvalidArgument& error) {
    require(!found.empty(), "check throws only where there are findings");
    return require_readable(error.what());
  }
  run(schedule);
}

}  // namespace dualpipe::fuzz
