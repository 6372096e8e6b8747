#include "dualpipe/planner/explain.hpp"

#include <array>
#include <cstddef>
#include <iterator>
#include <unordered_map>

#include "dualpipe/detail/schedule/eight_steps.hpp"
#include "dualpipe/error.hpp"
#include "dualpipe/planner/report.hpp"
#include "dualpipe/schedule/generate.hpp"

namespace dualpipe::planner {
namespace {

constexpr const char* directions = "0 is the direction that enters at the nearer end, 1 the other one";
constexpr const char* chunks = "0 is the chunk on the way down, 1 the one on the way back";

/// A schedule that is known to be DualPipe or DualPipeV.
struct Numbered {
  bool is_v = false;
  std::vector<std::vector<detail::NumberedStep>> ranks;

  int innermost() const { return static_cast<int>(is_v ? ranks.size() : ranks.size() / 2) - 1; }
};

Numbered numbered(const Schedule& schedule) {
  const int num_ranks = static_cast<int>(schedule.ranks.size());
  for (const bool is_v : {false, true}) {
    const ScheduleSpec spec{is_v ? "dualpipev" : "dualpipe", num_ranks, schedule.num_micro_batches};
    if (num_ranks == 0 || schedule.num_stages != (is_v ? 2 : 1) * num_ranks) continue;
    try {
      if (make_schedule(spec).ranks == schedule.ranks) return {is_v, detail::eight_steps(spec)};
    } catch (const InvalidArgument&) {  // no such schedule of this size
    }
  }
  throw InvalidArgument(detail::str("the eight steps are those of dualpipe and dualpipev; the schedule '",
                                    schedule.name, "' is neither"));
}

/// How often each step is repeated on a rank.
std::array<int, 8> repeats(const std::vector<detail::NumberedStep>& steps) {
  std::array<int, 8> result{};
  for (const detail::NumberedStep& step : steps) result[step.number - 1] = step.repetition + 1;
  return result;
}

}  // namespace

std::vector<std::vector<Section>> eight_steps(const Schedule& schedule) {
  std::vector<std::vector<Section>> result;
  for (const auto& steps : numbered(schedule).ranks) {
    auto& sections = result.emplace_back();
    for (int i = 0; i < std::ssize(steps); ++i) {
      if (sections.empty() || sections.back().number != steps[i].number) sections.push_back({steps[i].number, i, i});
      sections.back().end = i + 1;
    }
  }
  return result;
}

std::vector<Mark> step_marks(const Schedule& schedule, const Timeline& timeline) {
  const std::vector<std::vector<Section>> steps = eight_steps(schedule);
  std::vector<std::unordered_map<Op, Window>> times(schedule.ranks.size());
  for (const Interval& interval : timeline.intervals)
    if (interval.lane == Lane::compute && interval.rank >= 0 && interval.rank < static_cast<int>(times.size()))
      times[interval.rank][interval.step.op] = {interval.begin, interval.end};
  std::vector<Mark> marks;
  for (std::size_t rank = 0; rank < steps.size(); ++rank) {
    const auto time = [&](int step) {
      const Op& op = schedule.ranks[rank][step].op;
      const auto found = times[rank].find(op);
      DUALPIPE_CHECK(found != times[rank].end(), "the timeline '", timeline.name, "' lacks ", to_string(op),
                     " of rank ", rank);
      return found->second;
    };
    for (const Section& section : steps[rank])
      marks.push_back({static_cast<int>(rank),
                       {time(section.begin).begin, time(section.end - 1).end},
                       std::to_string(section.number)});
  }
  return marks;
}

std::vector<std::string> step_notes(const Schedule& schedule) {
  const Numbered shape = numbered(schedule);
  const char* other = shape.is_v ? "chunk 1" : "the other direction";
  const std::array<std::array<std::string, 2>, 8> what{{
      {"F0", "forwards fill the pipeline; the further in a rank, the fewer it has time for"},
      {"F0 F1",
       detail::str("forwards in turns, from here on also of ", other, ", whose first micro-batch has arrived")},
      {"I1 W1 F1",
       "the first backwards: I, as the next rank waits for it, then W, which frees the memory for the next F"},
      {"F0&B1 F1&B0", "the main part: every forward runs as a pair with a backward, and no rank waits"},
      {"B1 F1&B0", "no forward of 0 is left: the backwards of 1 run alone, its last forwards with the backwards of 0"},
      {"B1 B0", "backwards only; in the second half of these the weight part is put aside, for the gaps that follow"},
      {"W I0", "the last input gradients pass through; weight parts that were put aside fill the time between them"},
      {"W", "the weight parts that are left"},
  }};
  std::vector<std::string> notes{detail::str("The eight steps (", shape.is_v ? chunks : directions,
                                             "), with their repetitions from the outer to the inner ranks:")};
  if (shape.is_v)
    notes[0] = detail::str("The eight steps (", chunks, "), with their repetitions from rank 0 to rank ",
                           shape.innermost(), ":");
  for (std::size_t step = 0; step < what.size(); ++step) {
    const int first = repeats(shape.ranks.front())[step], last = repeats(shape.ranks[shape.innermost()])[step];
    const std::string times = first == last ? std::to_string(first) : detail::str(first, " to ", last);
    const std::string name = what[step][0];
    notes.push_back(detail::str(step + 1, "  ", name, std::string(name.size() < 11 ? 11 - name.size() : 0, ' '), " x ",
                                times, std::string(times.size() < 8 ? 8 - times.size() : 0, ' '), "  ", what[step][1]));
  }
  return notes;
}

}  // namespace dualpipe::planner
