#pragma once

#include "dualpipe/schedule/check.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "dualpipe/detail/schedule/cell_table.hpp"
#include "dualpipe/detail/schedule/deadlock.hpp"
#include "dualpipe/detail/schedule/dependencies.hpp"
#include "dualpipe/detail/schedule/for_each_op.hpp"
#include "dualpipe/error.hpp"

namespace dualpipe::detail {

// One mistake often shows in thousands of places; nobody reads more than a few.
inline constexpr int max_findings_per_rank = 8;
inline constexpr std::size_t max_findings = 256;

class ScheduleFindings {
 public:
  explicit ScheduleFindings(std::size_t num_ranks) : counts_(num_ranks + 1, 0) {}

  template <class... Parts>
  void add(int rank, int cell, const Parts&... message) {
    if (list_.size() == max_findings) {
      ++unlisted_;
      return;
    }
    if (++counts_[rank + 1] <= max_findings_per_rank) list_.push_back({rank, cell, str(message...)});
  }

  bool empty() const { return list_.empty(); }

  std::vector<Violation> take() {
    for (std::size_t i = 0; i < counts_.size(); ++i) {
      if (counts_[i] > max_findings_per_rank)
        list_.push_back({static_cast<int>(i) - 1, -1,
                         str("and ", counts_[i] - max_findings_per_rank,
                             i == 0 ? " more about the whole schedule" : " more on this rank")});
    }
    if (unlisted_ > 0) list_.push_back({-1, -1, str("and ", unlisted_, " more")});
    return std::move(list_);
  }

 private:
  std::vector<Violation> list_;
  std::vector<std::int64_t> counts_;  // by rank, the whole schedule (rank -1) first
  std::int64_t unlisted_ = 0;         // of any rank, after the list is full
};

class ScheduleChecker {
 public:
  explicit ScheduleChecker(const Schedule& schedule) : schedule_(schedule), findings_(schedule.ranks.size()) {}

  // The checks of order and deadlock need a complete schedule.
  std::vector<Violation> run() {
    if (has_table()) {
      collect();
      find_incomplete();
      if (findings_.empty()) find_misordered();
      if (!findings_.empty()) return findings_.take();
      if (const auto deadlock = find_deadlock(schedule_, table_))
        findings_.add(deadlock->place.rank, deadlock->place.cell, "deadlock: ", deadlock->cycle);
    }
    return findings_.take();
  }

 private:
  // Makes the table if the schedule has ops enough to fill it. If not, the schedule is incomplete, and two mistyped
  // numbers could make the table huge.
  bool has_table();
  void collect();
  void collect(const Op& op, const CellPlace& place);
  void find_incomplete();
  void find_misordered();

  const Schedule& schedule_;
  ScheduleFindings findings_;
  CellTable table_;
};

inline bool ScheduleChecker::has_table() {
  const int stages = schedule_.num_stages;
  const int micro_batches = schedule_.num_micro_batches;
  if (stages < 1 || micro_batches < 1) {
    findings_.add(-1, -1, "a schedule has at least one stage and one micro-batch, this one has ", stages, " and ",
                  micro_batches);
    return false;
  }
  const std::int64_t ops = count_ops(schedule_);
  const std::int64_t places = std::int64_t{stages} * micro_batches;
  if (places <= ops) {
    table_ = CellTable(stages, micro_batches);
    return true;
  }
  // Fewer ops than forwards needed, so one of the first ops + 1 forwards is missing.
  std::vector<char> seen(ops + 1, 0);
  for (const auto& steps : schedule_.ranks) {
    for_each_op(steps, [&](const Op& op) {
      const std::int64_t place = std::int64_t{op.stage} * micro_batches + op.micro_batch;
      if (op.pass == Pass::Forward && place >= 0 && place <= ops) seen[place] = 1;
    });
  }
  const auto first = std::find(seen.begin(), seen.end(), char{0}) - seen.begin();
  const Op missing{Pass::Forward, static_cast<int>(first / micro_batches), static_cast<int>(first % micro_batches)};
  findings_.add(-1, -1, stages, " stages and ", micro_batches, " micro-batches need ", places,
                " forwards and as many backwards, the schedule has ", ops, " ops; the first that is missing is ",
                to_string(missing));
  return false;
}

inline void ScheduleChecker::collect() {
  for (int rank = 0; rank < std::ssize(schedule_.ranks); ++rank) {
    const auto& steps = schedule_.ranks[rank];
    for (int cell = 0; cell < std::ssize(steps); ++cell) {
      const Step& step = steps[cell];
      const CellPlace place{rank, cell};
      visit_ops(step, [&](const Op& op) { collect(op, place); });
      if (step.overlapped && (step.op.pass != Pass::Forward || !is_backward(step.overlapped->pass)))
        findings_.add(place.rank, place.cell, to_string(step),
                      " is no pair of a forward and a backward (F first, then B or I)");
    }
  }
}

inline void ScheduleChecker::collect(const Op& op, const CellPlace& place) {
  const auto pass = pass_index(op.pass);
  if (!pass) {
    findings_.add(place.rank, place.cell, "a pass with the value ", static_cast<int>(op.pass),
                  " is none of F, I, W, B");
  } else if (op.stage < 0 || op.stage >= schedule_.num_stages || op.micro_batch < 0 ||
             op.micro_batch >= schedule_.num_micro_batches) {
    findings_.add(place.rank, place.cell, to_string(op), " lies outside of ", schedule_.num_stages, " stages and ",
                  schedule_.num_micro_batches, " micro-batches");
  } else if (CellPlace& first = table_(op.stage, op.micro_batch).places[*pass]; first) {
    findings_.add(place.rank, place.cell, to_string(op), " is done twice, before in ", to_string(first));
  } else {
    first = place;
  }
}

inline void ScheduleChecker::find_incomplete() {
  for (int s = 0; s < schedule_.num_stages; ++s) {
    for (int m = 0; m < schedule_.num_micro_batches; ++m) {
      const CellPasses& here = table_(s, m);
      const auto text = [&](Pass pass) { return to_string(Op{pass, s, m}); };
      const CellPlace home = here.any();
      const auto missing = [&](Pass pass, const CellPlace& near, const std::string& why) {
        findings_.add(near.rank, near.cell, text(pass), " is missing", why);
      };
      const bool whole = bool(here[Pass::Backward]);
      const bool input = bool(here[Pass::BackwardInput]);
      const bool weight = bool(here[Pass::BackwardWeight]);
      if (!here[Pass::Forward]) missing(Pass::Forward, home, "");
      if (whole && (input || weight)) {
        const Pass part = input ? Pass::BackwardInput : Pass::BackwardWeight;
        findings_.add(here[part].rank, here[part].cell, text(part), " is part of ", text(Pass::Backward),
                      ", which is done in ", to_string(here[Pass::Backward]));
      } else if (!whole && !input && !weight) {
        missing(Pass::Backward, home,
                str(" (or ", text(Pass::BackwardInput), " and ", text(Pass::BackwardWeight), ")"));
      } else if (!whole && !input) {
        missing(Pass::BackwardInput, here[Pass::BackwardWeight], ", " + text(Pass::BackwardWeight) + " needs it");
      } else if (!whole && !weight) {
        missing(Pass::BackwardWeight, here[Pass::BackwardInput],
                ", " + text(Pass::BackwardInput) + " is only half of a backward");
      }
      for (std::size_t i = 0; i < all_passes.size(); ++i) {
        const CellPlace& place = here.places[i];
        if (place && place.rank != home.rank)
          findings_.add(place.rank, place.cell, text(all_passes[i]), " is on another rank than the rest of stage ", s,
                        " of micro-batch ", m, ", which is in ", to_string(home));
      }
    }
  }
}

inline void ScheduleChecker::find_misordered() {
  for (int s = 0; s < schedule_.num_stages; ++s) {
    for (int m = 0; m < schedule_.num_micro_batches; ++m) {
      const CellPasses& here = table_(s, m);
      const auto in_order = [&](Pass first, Pass then) {
        const CellPlace& a = here[first];
        const CellPlace& b = here[then];
        if (!a || !b || a.cell < b.cell) return;
        findings_.add(b.rank, b.cell, to_string(Op{then, s, m}),
                      a.cell == b.cell ? " is paired with " : " comes before ", to_string(Op{first, s, m}),
                      ", which it needs", a.cell == b.cell ? "" : " and which is in " + to_string(a));
      };
      for (const Pass then : {Pass::Backward, Pass::BackwardInput, Pass::BackwardWeight})
        in_order(*pass_before(then), then);
    }
  }
}

}  // namespace dualpipe::detail

namespace dualpipe {

std::string to_string(const Violation& violation) {
  std::string where;
  if (violation.rank >= 0) where += detail::str("rank ", violation.rank, ", ");
  if (violation.cell >= 0) where += detail::str("cell ", violation.cell + 1, ": ");
  return where + violation.message;
}

std::vector<Violation> violations(const Schedule& schedule) { return detail::ScheduleChecker(schedule).run(); }

void check(const Schedule& schedule) {
  const std::vector<Violation> found = violations(schedule);
  if (found.empty()) return;
  const Violation& first = found.front();
  std::string more;
  if (found.size() > 1)
    more = detail::str("\n(and ", found.size() - 1, found.size() == 2 ? " more finding)" : " more findings)");
  constexpr int radius = 2;
  throw InvalidArgument(detail::str("schedule \"", schedule.name, "\" cannot run: ", to_string(first), more, "\n",
                                    cells_around(schedule, first.rank, first.cell, radius)));
}

}  // namespace dualpipe
