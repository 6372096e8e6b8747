#pragma once

#include "dualpipe/detail/comm/activity.hpp"

#include <deque>
#include <set>

#include "dualpipe/error.hpp"

namespace dualpipe::detail {

inline std::string list_of_ranks(const std::vector<int>& ranks) {
  std::string text;
  for (const int rank : ranks) text += str(text.empty() ? "" : ", ", "rank ", rank);
  return text;
}

Culprit find_culprit(int rank, const std::vector<int>& waits_for,
                     const std::function<std::optional<RankActivity>(int)>& ask) {
  Culprit culprit{.rank = waits_for.empty() ? rank : waits_for.front(), .chain = {}};
  std::optional<int> silent;
  std::set<int> seen{rank};
  std::deque<int> next(waits_for.begin(), waits_for.end());
  for (; !next.empty(); next.pop_front()) {
    const int other = next.front();
    if (!seen.insert(other).second) continue;
    const std::optional<RankActivity> activity = ask(other);
    if (!activity) {
      // Stopped, or its connection is busy: blamed only where nobody else is found.
      if (!silent) silent = other;
      culprit.chain += str("; rank ", other, " does not answer");
    } else if (!activity->waits_for.empty()) {
      culprit.chain +=
          str("; rank ", other, " waits for ", list_of_ranks(activity->waits_for), " in ", activity->operation);
      next.insert(next.end(), activity->waits_for.begin(), activity->waits_for.end());
    } else {
      culprit.rank = other;
      culprit.chain += str("; rank ", other, " runs code of its own");
      culprit.chain += activity->operation.empty() ? ", and has not waited for anybody yet"
                                                   : str(" for ", activity->seconds, " s, since ", activity->operation);
      return culprit;
    }
  }
  if (silent)
    culprit.rank = *silent;
  else
    culprit.chain += "; they wait for each other";
  return culprit;
}

}  // namespace dualpipe::detail
