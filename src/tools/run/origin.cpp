#include "tools/run/origin.hpp"

#include <algorithm>
#include <map>
#include <tuple>
#include <utility>

namespace dualpipe::run {

std::optional<int> find_origin(const std::vector<Testimony>& testimonies) {
  if (testimonies.empty()) return std::nullopt;
  using First = std::pair<std::int64_t, bool>;  // killed before others of the same time
  struct Votes {
    int count = 0;
    First first;
  };
  std::map<int, Votes> votes;
  for (const Testimony& testimony : testimonies) {
    const First when(testimony.time_ns, !testimony.killed);
    Votes& of = votes[testimony.origin];
    of.first = of.count == 0 ? when : std::min(of.first, when);
    ++of.count;
  }
  return std::min_element(votes.begin(), votes.end(),
                          [](const auto& a, const auto& b) {
                            return std::tuple(-a.second.count, a.second.first) <
                                   std::tuple(-b.second.count, b.second.first);
                          })
      ->first;
}

}  // namespace dualpipe::run
