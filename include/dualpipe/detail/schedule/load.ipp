#pragma once

#include "dualpipe/schedule/load.hpp"

#include <filesystem>
#include <iterator>
#include <string>
#include <system_error>

#include "dualpipe/detail/files.hpp"
#include "dualpipe/error.hpp"
#include "dualpipe/schedule/generate.hpp"

namespace dualpipe {

Schedule load_schedule(const ScheduleSpec& spec) {
  const std::string& name = spec.kind;
  if (is_schedule_kind(name)) return make_schedule(spec);
  std::error_code ignored;
  DUALPIPE_CHECK(std::filesystem::exists(name, ignored), "schedule \"", name, "\" is neither a kind (",
                 detail::joined_schedule_kinds(), ") nor a file");
  Schedule schedule;
  const std::string text = detail::read_file(name);
  try {
    schedule = from_csv(text, name);
  } catch (const InvalidArgument& error) {
    throw InvalidArgument(detail::str(name, ": ", error.what()));
  }
  const auto ranks = std::ssize(schedule.ranks);
  DUALPIPE_CHECK(spec.num_ranks == 0 || spec.num_ranks == ranks, "schedule ", name, " is for ", ranks,
                 " ranks, there are ", spec.num_ranks);
  DUALPIPE_CHECK(spec.num_micro_batches == 0 || spec.num_micro_batches == schedule.num_micro_batches, "schedule ", name,
                 " has ", schedule.num_micro_batches, " micro-batches, num_micro_batches is ", spec.num_micro_batches);
  return schedule;
}

}  // namespace dualpipe
