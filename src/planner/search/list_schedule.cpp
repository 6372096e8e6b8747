#include <algorithm>
#include <deque>
#include <limits>
#include <queue>
#include <tuple>
#include <utility>
#include <vector>

#include "dualpipe/detail/schedule/dependencies.hpp"
#include "planner/search/problem.hpp"

namespace dualpipe::detail {
namespace {

constexpr double never = std::numeric_limits<double>::infinity();

/// The passes of one route and stage, in the order of the micro-batches.
struct Line {
  int route = 0, stage = 0;
  int forwards = 0, backwards = 0;                 // begun
  std::vector<double> activation_at, gradient_at;  // by turn: when the input is there
};

class ListScheduler {
 public:
  ListScheduler(const SearchProblem& problem, const ListRule& rule)
      : problem_(problem), rule_(rule), lines_of_(problem.num_ranks), ranks_(problem.num_ranks) {
    for (int route = 0; route < static_cast<int>(problem.routes.size()); ++route) {
      const std::size_t count = problem.routes[route].micro_batches.size();
      for (int stage = 0; stage < problem.num_stages; ++stage) {
        const bool first = stage == 0, last = stage + 1 == problem.num_stages;
        lines_.push_back({.route = route,
                          .stage = stage,
                          .activation_at = std::vector<double>(count, first ? 0 : never),
                          .gradient_at = std::vector<double>(count, last ? 0 : never)});
        lines_of_[problem.routes[route].ranks[stage]].push_back(static_cast<int>(lines_.size()) - 1);
      }
    }
    for (int rank = 0; rank < problem.num_ranks; ++rank) ranks_[rank].held = problem.state_of(rank);
    result_.name = "list schedule";
    result_.num_stages = problem.num_stages;
    result_.num_micro_batches = problem.num_micro_batches;
    result_.ranks.resize(problem.num_ranks);
  }

  std::optional<Schedule> operator()() && {
    for (int rank = 0; rank < problem_.num_ranks; ++rank) events_.emplace(0.0, rank);
    while (!events_.empty()) {
      const auto [now, rank] = events_.top();
      events_.pop();
      if (ranks_[rank].free_at > now) continue;
      if (const auto step = choose(rank, now)) begin(rank, now, *step);
    }
    for (const Line& line : lines_)
      if (line.backwards < static_cast<int>(line.activation_at.size())) return std::nullopt;
    return std::move(result_);
  }

 private:
  struct Rank {
    double free_at = 0;
    int activations = 0;
    double held = 0;
    std::deque<Op> waiting;  // W
  };

  Line& line_of(const Op& op) { return lines_[problem_.route_of[op.micro_batch] * problem_.num_stages + op.stage]; }
  Op op_of(const Line& line, Pass pass, int turn) const {
    return {pass, line.stage, problem_.routes[line.route].micro_batches[turn]};
  }
  double duration(const Step& step, int rank) const { return problem_.table.times(step, rank).duration; }

  bool may_begin_forward(const Line& line, int rank, double now) const {
    if (line.forwards == static_cast<int>(line.activation_at.size()) || line.activation_at[line.forwards] > now)
      return false;
    if (line.stage == 0 && rule_.in_flight > 0 && in_flight_ >= rule_.in_flight) return false;
    return ranks_[rank].activations < problem_.limits.activations &&
           ranks_[rank].held + problem_.memory[line.stage].activation <= problem_.limits.memory;
  }

  bool may_begin_backward(const Line& line, double now) const {
    return line.backwards < line.forwards && line.gradient_at[line.backwards] <= now;
  }

  bool may_wait(int rank, int stage) const {
    const planner::StageMemory& memory = problem_.memory[stage];
    return static_cast<int>(ranks_[rank].waiting.size()) < problem_.limits.weights &&
           ranks_[rank].held - memory.activation + memory.weight <= problem_.limits.memory;
  }

  std::optional<Step> choose(int rank, double now) {
    std::vector<const Line*> forwards, backwards;
    for (const int index : lines_of_[rank]) {
      const Line& line = lines_[index];
      if (may_begin_backward(line, now)) backwards.push_back(&line);
      if (may_begin_forward(line, rank, now)) forwards.push_back(&line);
    }
    const auto by = [](const auto& key) { return [key](const Line* a, const Line* b) { return key(*a) < key(*b); }; };
    std::sort(backwards.begin(), backwards.end(),
              by([](const Line& line) { return std::tuple(line.backwards, line.stage, line.route); }));
    std::sort(forwards.begin(), forwards.end(), by([this](const Line& line) {
                return rule_.deepest ? std::tuple(-line.stage, line.forwards, line.route)
                                     : std::tuple(line.forwards, line.stage, line.route);
              }));
    if (rule_.pairs)
      if (const auto pair = best_pair(forwards, backwards, rank)) return pair;
    if (!backwards.empty()) {
      const Line& line = *backwards.front();
      const bool split = rule_.split && may_wait(rank, line.stage);
      return Step{op_of(line, split ? Pass::BackwardInput : Pass::Backward, line.backwards), std::nullopt};
    }
    if (!forwards.empty())
      return Step{op_of(*forwards.front(), Pass::Forward, forwards.front()->forwards), std::nullopt};
    if (!ranks_[rank].waiting.empty()) return Step{ranks_[rank].waiting.front(), std::nullopt};
    return std::nullopt;
  }

  /// The pair that saves most, of different stages where that saves as much; nothing where all of them cost time.
  std::optional<Step> best_pair(const std::vector<const Line*>& forwards, const std::vector<const Line*>& backwards,
                                int rank) const {
    std::optional<Step> best;
    std::pair<double, bool> least{1e-9, true};
    for (const Line* backward : backwards)
      for (const Line* forward : forwards) {
        const Op f = op_of(*forward, Pass::Forward, forward->forwards);
        const Op b = op_of(*backward, Pass::Backward, backward->backwards);
        const double cost =
            duration({f, b}, rank) - duration({f, std::nullopt}, rank) - duration({b, std::nullopt}, rank);
        const std::pair<double, bool> key{cost, forward == backward};
        if (key >= least) continue;
        least = key;
        best = Step{f, b};
      }
    return best;
  }

  void begin(int rank, double now, const Step& step) {
    result_.ranks[rank].push_back(step);
    const StepTimes times = problem_.table.times(step, rank);
    ranks_[rank].free_at = now + times.duration;
    events_.emplace(ranks_[rank].free_at, rank);
    account(rank, step.op);
    publish(rank, now, step.op, times, 0);
    if (!step.overlapped) return;
    account(rank, *step.overlapped);
    publish(rank, now, *step.overlapped, times, 1);
  }

  void account(int rank, const Op& op) {
    Rank& here = ranks_[rank];
    const planner::StageMemory& memory = problem_.memory[op.stage];
    if (op.pass == Pass::Forward) {
      ++line_of(op).forwards;
      ++here.activations;
      here.held += memory.activation;
      if (op.stage == 0) ++in_flight_;
      return;
    }
    if (op.pass == Pass::BackwardWeight) {
      here.waiting.pop_front();
      here.held -= memory.weight;
      return;
    }
    ++line_of(op).backwards;
    --here.activations;
    here.held -= memory.activation;
    if (op.stage == 0) --in_flight_;
    if (op.pass == Pass::Backward) return;
    here.waiting.push_back({Pass::BackwardWeight, op.stage, op.micro_batch});
    here.held += memory.weight;
  }

  void publish(int rank, double now, const Op& op, const StepTimes& times, int which) {
    const bool forward = op.pass == Pass::Forward;
    // A rank that waits because too many micro-batches are in flight may go on when one has ended.
    if (is_backward(op.pass) && op.stage == 0)
      for (const PipelineRoute& route : problem_.routes) events_.emplace(now + times.duration, route.ranks[0]);
    const auto output = output_of(op, problem_.num_stages);
    if (!output) return;
    const int to_stage = output->receiver();
    const PipelineRoute& route = problem_.routes[problem_.route_of[op.micro_batch]];
    const int to = route.ranks[to_stage];
    const double at =
        now + (to == rank ? times.duration
                          : times.ready[which] + problem_.table.send(boundary_of(output->payload, op.stage), rank, to));
    Line& next = line_of({op.pass, to_stage, op.micro_batch});
    const Line& here = line_of(op);
    (forward ? next.activation_at : next.gradient_at)[(forward ? here.forwards : here.backwards) - 1] = at;
    events_.emplace(at, to);
  }

  using Event = std::pair<double, int>;  // time, rank

  const SearchProblem& problem_;
  const ListRule& rule_;
  std::vector<Line> lines_;  // by route and stage
  std::vector<std::vector<int>> lines_of_;
  std::vector<Rank> ranks_;
  int in_flight_ = 0;
  std::priority_queue<Event, std::vector<Event>, std::greater<>> events_;
  Schedule result_;
};

}  // namespace

std::optional<Schedule> list_schedule(const SearchProblem& problem, const ListRule& rule) {
  return ListScheduler(problem, rule)();
}

}  // namespace dualpipe::detail
