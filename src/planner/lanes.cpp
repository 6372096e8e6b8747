#include <algorithm>
#include <cstddef>
#include <string>

#include "dualpipe/error.hpp"
#include "planner/text_line.hpp"

namespace dualpipe::detail {
namespace {

constexpr double widest = 200, narrowest = 60;

class Lanes {
 public:
  explicit Lanes(const Picture& picture) : picture_(picture) {}

  /// "attention-F", with the micro-batch where there are several; "F3", "F3&B1" of a step without nodes.
  std::string label(const Interval& interval) const {
    const auto brief = [](const Op& op) { return str(static_cast<char>(op.pass), op.micro_batch); };
    if (interval.lane == Lane::compute)
      return brief(interval.step.op) + (interval.step.overlapped ? "&" + brief(*interval.step.overlapped) : "");
    return node_label(interval) + (picture_.one_pair ? "" : std::to_string(interval.step.op.micro_batch));
  }

  /// What a rank computes, by begin: nodes, and steps as a whole.
  static std::vector<const Interval*> computing(const Picture::Row& row) {
    std::vector<const Interval*> all = row.nodes;
    for (const ActiveStep& step : row.activity.steps)
      if (step.whole) all.push_back(step.interval);
    std::stable_sort(all.begin(), all.end(), [](const Interval* a, const Interval* b) { return a->begin < b->begin; });
    return all;
  }

  /// Columns per time at which all labels fit, within the limits.
  double scale() const {
    double scale = narrowest / picture_.length();
    for (const auto& row : picture_.rows)
      for (const auto& intervals : {computing(row), row.collectives})
        for (const Interval* interval : intervals) {
          const double length = picture_.shown(*interval).length();
          if (length > 0) scale = std::max(scale, static_cast<double>(label(*interval).size() + 2) / length);
        }
    return std::min(scale, widest / picture_.length());
  }

  std::string line(const std::string& title, const std::vector<const Interval*>& intervals, int rank,
                   const Columns& column, bool color) const {
    TextLine line;
    line.text(title).pad_to(column.indent);
    for (const Interval* interval : intervals) {
      const auto [begin, end] = picture_.shown(*interval);
      line.pad_to(column(begin), '.');
      // If two overlap, the later one is shortened.
      const std::size_t last = column(end);
      if (last <= line.size()) continue;
      std::string text = fitted("[" + label(*interval), last - line.size());
      if (text.size() > 1) text.back() = ']';
      line.text(text, style_of(colored_op(*interval), picture_.second_half(rank, interval->step.op)));
    }
    return line.pad_to(column(picture_.end), '.').str(color);
  }

 private:
  const Picture& picture_;
};

}  // namespace

std::string lanes_to_ascii(const Timeline& timeline, const Picture& picture, const planner::PictureOptions& options) {
  if (picture.length() <= 0) return "";
  const Lanes lanes(picture);
  const std::string names[] = {" compute", " communication"};
  const std::string rank_name = picture.num_ranks > 1 ? str("rank ", picture.num_ranks - 1, ",") : "";
  const Columns column{picture, rank_name.size() + names[1].size() + 2, lanes.scale()};
  std::string out = column.axis(timeline.seconds_per_unit, options.color);
  for (const auto& row : picture.rows) {
    const std::string rank = picture.num_ranks > 1 ? fitted(str("rank ", row.rank, ","), rank_name.size()) : "";
    const auto title = [&](const std::string& name) { return (rank + name).substr(rank.empty() ? 1 : 0); };
    out += lanes.line(title(names[0]), Lanes::computing(row), row.rank, column, options.color);
    out += lanes.line(title(names[1]), row.collectives, row.rank, column, options.color);
    if (!options.marks.empty()) out += mark_line(options.marks, row.rank, column);
  }
  for (const std::string& note : options.notes) out += note + "\n";
  return out;
}

}  // namespace dualpipe::detail
