#include "dualpipe/schedule/check.hpp"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>

#include "dualpipe/error.hpp"

namespace dualpipe {
namespace {

// A schedule that is wrong in one way is often wrong in thousands of places; nobody reads more than a few of them.
constexpr int kFindingsPerRank = 8;
constexpr std::size_t kFindings = 256;

class Findings {
 public:
  explicit Findings(std::size_t num_ranks) : counts_(num_ranks + 1, 0) {}

  template <class... Parts>
  void add(int rank, int cell, const Parts&... message) {
    if (list_.size() == kFindings) {
      ++unlisted_;
      return;
    }
    if (++counts_[static_cast<std::size_t>(rank + 1)] <= kFindingsPerRank)
      list_.push_back({rank, cell, detail::str(message...)});
  }

  bool empty() const { return list_.empty(); }

  std::vector<Violation> take() {
    for (std::size_t i = 0; i < counts_.size(); ++i) {
      if (counts_[i] > kFindingsPerRank)
        list_.push_back({static_cast<int>(i) - 1, -1,
                         detail::str("and ", counts_[i] - kFindingsPerRank,
                                     i == 0 ? " more about the whole schedule" : " more on this rank")});
    }
    if (unlisted_ > 0) list_.push_back({-1, -1, detail::str("and ", unlisted_, " more")});
    return std::move(list_);
  }

 private:
  std::vector<Violation> list_;
  std::vector<std::int64_t> counts_;  // by rank, the whole schedule (rank -1) first
  std::int64_t unlisted_ = 0;         // of any rank, after the list is full
};

struct Place {
  int rank = -1;
  int cell = -1;
  explicit operator bool() const { return rank >= 0; }
};

// Cells are counted from 1 in what people read.
std::string at(const Place& place) { return detail::str("cell ", place.cell + 1, " of rank ", place.rank); }

constexpr std::array kPasses = {Pass::Forward, Pass::BackwardInput, Pass::BackwardWeight, Pass::Backward};

std::optional<std::size_t> index_of(Pass pass) {
  const auto found = std::find(kPasses.begin(), kPasses.end(), pass);
  if (found == kPasses.end()) return std::nullopt;
  return static_cast<std::size_t>(found - kPasses.begin());
}

bool hands_on_gradient(Pass pass) { return pass == Pass::Backward || pass == Pass::BackwardInput; }

// Where the passes of one stage and micro-batch stand.
struct Passes {
  std::array<Place, kPasses.size()> places;

  const Place& operator[](Pass pass) const { return places[*index_of(pass)]; }
  Pass gradient_pass() const { return (*this)[Pass::Backward] ? Pass::Backward : Pass::BackwardInput; }
  Place any() const {
    const auto found = std::find_if(places.begin(), places.end(), [](const Place& place) { return bool(place); });
    return found == places.end() ? Place{} : *found;
  }
};

class Checker {
 public:
  explicit Checker(const Schedule& schedule) : schedule_(schedule), findings_(schedule.ranks.size()) {}

  // Order and deadlock take a complete schedule for granted.
  std::vector<Violation> run() {
    if (has_table()) {
      collect();
      find_incomplete();
      if (findings_.empty()) find_misordered();
      if (findings_.empty()) find_deadlock();
    }
    return findings_.take();
  }

 private:
  std::size_t index(int stage, int micro_batch) const {
    return static_cast<std::size_t>(stage) * static_cast<std::size_t>(schedule_.num_micro_batches) +
           static_cast<std::size_t>(micro_batch);
  }
  const Passes& passes(int stage, int micro_batch) const { return table_[index(stage, micro_batch)]; }
  std::int64_t count_ops() const;

  // Makes the table, unless most of it would be empty: then the schedule is incomplete, and the table could be as large
  // as the product of two slips.
  bool has_table();
  void collect();
  void collect(const Op& op, const Place& place);
  void find_incomplete();
  void find_misordered();
  void find_deadlock();
  std::optional<Op> missing_input(const Op& op, const std::vector<char>& forward_done,
                                  const std::vector<char>& gradient_done) const;
  void report_cycle(const std::vector<std::size_t>& next_cell, const std::vector<std::optional<Op>>& waits_for);

  const Schedule& schedule_;
  Findings findings_;
  std::vector<Passes> table_;  // [stage * num_micro_batches + micro_batch]
};

std::int64_t Checker::count_ops() const {
  std::int64_t ops = 0;
  for (const auto& steps : schedule_.ranks)
    for (const Step& step : steps) ops += step.overlapped ? 2 : 1;
  return ops;
}

bool Checker::has_table() {
  const int stages = schedule_.num_stages;
  const int micro_batches = schedule_.num_micro_batches;
  if (stages < 1 || micro_batches < 1) {
    findings_.add(-1, -1, "a schedule has at least one stage and one micro-batch, this one has ", stages, " and ",
                  micro_batches);
    return false;
  }
  const std::int64_t ops = count_ops();
  const std::int64_t places = std::int64_t{stages} * micro_batches;
  if (places <= ops) {
    table_.resize(static_cast<std::size_t>(places));
    return true;
  }
  // Fewer ops than forwards needed, so one of the first ops + 1 forwards is missing.
  std::vector<char> seen(static_cast<std::size_t>(ops) + 1, 0);
  for (const auto& steps : schedule_.ranks) {
    for (const Step& step : steps) {
      for (const Op& op : {step.op, step.overlapped.value_or(step.op)}) {
        const std::int64_t place = std::int64_t{op.stage} * micro_batches + op.micro_batch;
        if (op.pass == Pass::Forward && place >= 0 && place <= ops) seen[static_cast<std::size_t>(place)] = 1;
      }
    }
  }
  const auto first = std::find(seen.begin(), seen.end(), char{0}) - seen.begin();
  const Op missing{Pass::Forward, static_cast<int>(first / micro_batches), static_cast<int>(first % micro_batches)};
  findings_.add(-1, -1, stages, " stages and ", micro_batches, " micro-batches need ", places,
                " forwards and as many backwards, the schedule has ", ops, " ops; the first that is missing is ",
                to_string(missing));
  return false;
}

void Checker::collect() {
  for (std::size_t rank = 0; rank < schedule_.ranks.size(); ++rank) {
    const auto& steps = schedule_.ranks[rank];
    for (std::size_t cell = 0; cell < steps.size(); ++cell) {
      const Step& step = steps[cell];
      const Place place{static_cast<int>(rank), static_cast<int>(cell)};
      collect(step.op, place);
      if (!step.overlapped) continue;
      collect(*step.overlapped, place);
      if (step.op.pass != Pass::Forward || !hands_on_gradient(step.overlapped->pass))
        findings_.add(place.rank, place.cell, to_string(step),
                      " is no pair of a forward and a backward (F first, then B or I)");
    }
  }
}

void Checker::collect(const Op& op, const Place& place) {
  const auto pass = index_of(op.pass);
  if (!pass) {
    findings_.add(place.rank, place.cell, "a pass with the value ", static_cast<int>(op.pass),
                  " is none of F, I, W, B");
  } else if (op.stage < 0 || op.stage >= schedule_.num_stages || op.micro_batch < 0 ||
             op.micro_batch >= schedule_.num_micro_batches) {
    findings_.add(place.rank, place.cell, to_string(op), " lies outside of ", schedule_.num_stages, " stages and ",
                  schedule_.num_micro_batches, " micro-batches");
  } else if (Place& first = table_[index(op.stage, op.micro_batch)].places[*pass]; first) {
    findings_.add(place.rank, place.cell, to_string(op), " is done twice, before in ", at(first));
  } else {
    first = place;
  }
}

void Checker::find_incomplete() {
  for (int s = 0; s < schedule_.num_stages; ++s) {
    for (int m = 0; m < schedule_.num_micro_batches; ++m) {
      const Passes& here = passes(s, m);
      const auto text = [&](Pass pass) { return to_string(Op{pass, s, m}); };
      const Place home = here.any();
      const auto missing = [&](Pass pass, const Place& near, const std::string& why) {
        findings_.add(near.rank, near.cell, text(pass), " is missing", why);
      };
      const bool whole = bool(here[Pass::Backward]);
      const bool input = bool(here[Pass::BackwardInput]);
      const bool weight = bool(here[Pass::BackwardWeight]);
      if (!here[Pass::Forward]) missing(Pass::Forward, home, "");
      if (whole && (input || weight)) {
        const Pass part = input ? Pass::BackwardInput : Pass::BackwardWeight;
        findings_.add(here[part].rank, here[part].cell, text(part), " is part of ", text(Pass::Backward),
                      ", which is done in ", at(here[Pass::Backward]));
      } else if (!whole && !input && !weight) {
        missing(Pass::Backward, home,
                detail::str(" (or ", text(Pass::BackwardInput), " and ", text(Pass::BackwardWeight), ")"));
      } else if (!whole && !input) {
        missing(Pass::BackwardInput, here[Pass::BackwardWeight], ", " + text(Pass::BackwardWeight) + " needs it");
      } else if (!whole && !weight) {
        missing(Pass::BackwardWeight, here[Pass::BackwardInput],
                ", " + text(Pass::BackwardInput) + " is only half of a backward");
      }
      for (std::size_t i = 0; i < kPasses.size(); ++i) {
        const Place& place = here.places[i];
        if (place && place.rank != home.rank)
          findings_.add(place.rank, place.cell, text(kPasses[i]), " is on another rank than the rest of stage ", s,
                        " of micro-batch ", m, ", which is in ", at(home));
      }
    }
  }
}

void Checker::find_misordered() {
  for (int s = 0; s < schedule_.num_stages; ++s) {
    for (int m = 0; m < schedule_.num_micro_batches; ++m) {
      const Passes& here = passes(s, m);
      const auto in_order = [&](Pass first, Pass then) {
        const Place& a = here[first];
        const Place& b = here[then];
        if (!a || !b || a.cell < b.cell) return;
        findings_.add(b.rank, b.cell, to_string(Op{then, s, m}),
                      a.cell == b.cell ? " is paired with " : " comes before ", to_string(Op{first, s, m}),
                      ", which it needs", a.cell == b.cell ? "" : " and which is in " + at(a));
      };
      in_order(Pass::Forward, Pass::Backward);
      in_order(Pass::Forward, Pass::BackwardInput);
      in_order(Pass::BackwardInput, Pass::BackwardWeight);
    }
  }
}

std::optional<Op> Checker::missing_input(const Op& op, const std::vector<char>& forward_done,
                                         const std::vector<char>& gradient_done) const {
  const int m = op.micro_batch;
  if (op.pass == Pass::Forward && op.stage > 0 && !forward_done[index(op.stage - 1, m)])
    return Op{Pass::Forward, op.stage - 1, m};
  if (hands_on_gradient(op.pass) && op.stage + 1 < schedule_.num_stages && !gradient_done[index(op.stage + 1, m)])
    return Op{passes(op.stage + 1, m).gradient_pass(), op.stage + 1, m};
  return std::nullopt;  // the rest is on the same rank and in order
}

// Runs all ranks as far as they get. A rank that stops waits for one op; doing that op wakes it.
void Checker::find_deadlock() {
  std::vector<char> forward_done(table_.size(), 0);
  std::vector<char> gradient_done(table_.size(), 0);
  std::vector<std::size_t> next_cell(schedule_.ranks.size(), 0);
  std::vector<std::optional<Op>> waits_for(schedule_.ranks.size());
  std::vector<int> runnable;
  for (std::size_t rank = schedule_.ranks.size(); rank-- > 0;) runnable.push_back(static_cast<int>(rank));

  const auto wake = [&](const Op& done, int stage) {
    if (stage < 0 || stage >= schedule_.num_stages) return;
    const int rank = passes(stage, done.micro_batch)[Pass::Forward].rank;
    auto& awaited = waits_for[static_cast<std::size_t>(rank)];
    if (awaited != done) return;
    awaited.reset();
    runnable.push_back(rank);
  };
  const auto finish = [&](const Op& op) {
    if (op.pass == Pass::Forward) {
      forward_done[index(op.stage, op.micro_batch)] = 1;
      wake(op, op.stage + 1);
    } else if (hands_on_gradient(op.pass)) {
      gradient_done[index(op.stage, op.micro_batch)] = 1;
      wake(op, op.stage - 1);
    }
  };
  while (!runnable.empty()) {
    const auto rank = static_cast<std::size_t>(runnable.back());
    runnable.pop_back();
    const auto& steps = schedule_.ranks[rank];
    for (std::size_t& cell = next_cell[rank]; cell < steps.size(); ++cell) {
      const Step& step = steps[cell];
      auto missing = missing_input(step.op, forward_done, gradient_done);
      if (!missing && step.overlapped) missing = missing_input(*step.overlapped, forward_done, gradient_done);
      if (missing) {
        waits_for[rank] = missing;
        break;
      }
      finish(step.op);
      if (step.overlapped) finish(*step.overlapped);
    }
  }
  report_cycle(next_cell, waits_for);
}

// Every rank that waits does so for an op of a rank that waits too, else that op would have been done: following them
// ends in a cycle.
void Checker::report_cycle(const std::vector<std::size_t>& next_cell, const std::vector<std::optional<Op>>& waits_for) {
  const auto place_of = [&](const Op& op) { return passes(op.stage, op.micro_batch)[op.pass]; };
  const auto stuck = std::find_if(waits_for.begin(), waits_for.end(), [](const auto& op) { return op.has_value(); });
  if (stuck == waits_for.end()) return;
  std::vector<char> seen(waits_for.size(), 0);
  auto rank = static_cast<std::size_t>(stuck - waits_for.begin());
  while (!seen[rank]) {
    seen[rank] = 1;
    rank = static_cast<std::size_t>(place_of(*waits_for[rank]).rank);
  }
  constexpr std::size_t kShown = 16;
  const std::size_t first = rank;
  std::string cycle;
  std::size_t length = 0;
  do {
    const Place wanted = place_of(*waits_for[rank]);
    const Step& step = schedule_.ranks[rank][next_cell[rank]];
    if (length < kShown) {
      cycle += detail::str(length == 0 ? "" : ", which ", length == 0 ? detail::str("rank ", rank, " ") : "",
                           "waits at cell ", next_cell[rank] + 1, " (", to_string(step), ") for ",
                           to_string(*waits_for[rank]));
      cycle += static_cast<std::size_t>(wanted.rank) == rank
                   ? detail::str(", its own cell ", wanted.cell + 1)
                   : detail::str(", cell ", wanted.cell + 1, " of rank ", wanted.rank);
    }
    ++length;
    rank = static_cast<std::size_t>(wanted.rank);
  } while (rank != first);
  if (length > kShown) cycle += detail::str(", and so on through ", length, " ranks");
  const auto waiting = std::count_if(waits_for.begin(), waits_for.end(), [](const auto& op) { return op.has_value(); });
  const auto others = static_cast<std::size_t>(waiting) - length;
  if (others > 0)
    cycle += detail::str("; ", others, others == 1 ? " other rank waits" : " other ranks wait", " behind them");
  findings_.add(static_cast<int>(first), static_cast<int>(next_cell[first]), "deadlock: ", cycle);
}

}  // namespace

std::vector<Violation> violations(const Schedule& schedule) { return Checker(schedule).run(); }

void check(const Schedule& schedule) {
  const std::vector<Violation> found = violations(schedule);
  if (found.empty()) return;
  const Violation& first = found.front();
  std::string where;
  if (first.rank >= 0) where += detail::str("rank ", first.rank, ", ");
  if (first.cell >= 0) where += detail::str("cell ", first.cell + 1, ": ");
  std::string more;
  if (found.size() > 1)
    more = detail::str("\n(and ", found.size() - 1, found.size() == 2 ? " more finding)" : " more findings)");
  constexpr int kRadius = 2;
  throw InvalidArgument(detail::str("schedule \"", schedule.name, "\" cannot run: ", where, first.message, more, "\n",
                                    cells_around(schedule, first.rank, first.cell, kRadius)));
}

}  // namespace dualpipe
