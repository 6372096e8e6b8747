#pragma once

#include "dualpipe/detail/config.hpp"
#include "dualpipe/schedule/schedule.hpp"
#include "dualpipe/schedule/schedule_spec.hpp"

namespace dualpipe {

/// The schedule that `spec.kind` names: one of schedule_kinds(), else the path of a CSV file, which is read but not
/// checked.
///
/// @param spec  its numbers must be those of the file, where they are not 0.
/// @throws InvalidArgument  as make_schedule and from_csv do, with the file's name; neither a kind nor a file.
DUALPIPE_DECL Schedule load_schedule(const ScheduleSpec& spec);

}  // namespace dualpipe

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/schedule/load.ipp"
#endif
