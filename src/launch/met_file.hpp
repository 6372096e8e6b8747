#pragma once

#include <set>
#include <string>

namespace dualpipe {
struct World;
}

// A rank tells its launcher whom it has met (DUALPIPE_MET_FILE): should it end, those find out by themselves.
namespace dualpipe::detail {

/// Empty: the launcher wants none, or `world` is not the one that it has launched.
std::string met_file(const World& world);

/// A meeting begins, or the rank has met another in it: rank 0 each that has come, the others rank 0.
void note_meeting(const std::string& met_file);
void note_met(const std::string& met_file, int rank);

struct Met {
  std::set<int> ranks;  ///< in the meeting that has begun last
  bool before = false;  ///< others, in an earlier one
};
Met read_met(const std::string& met_file);

}  // namespace dualpipe::detail
