#pragma once

#include <string>
#include <vector>

#include "dualpipe/detail/config.hpp"
#include "dualpipe/schedule/schedule.hpp"
#include "dualpipe/schedule/schedule_spec.hpp"

namespace dualpipe {

/// "dualpipe", "dualpipev", "1f1b", "zb1p", "gpipe", "interleaved", "zbv".
DUALPIPE_DECL const std::vector<std::string>& schedule_kinds();
DUALPIPE_DECL bool is_schedule_kind(const std::string& name);

/// @throws InvalidArgument  a kind, number of ranks or of micro-batches that is not supported; the text names what
/// would work.
DUALPIPE_DECL Schedule make_schedule(const ScheduleSpec& spec);

/// The least number of micro-batches, not below that of `spec`, for which the kind has an order on so many ranks.
DUALPIPE_DECL int supported_micro_batches(const ScheduleSpec& spec);

namespace detail {

/// "dualpipe, dualpipev, …"
DUALPIPE_DECL std::string joined_schedule_kinds();

}  // namespace detail

}  // namespace dualpipe

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/schedule/generate.ipp"
#endif
