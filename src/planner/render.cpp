#include "dualpipe/planner/render.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "dualpipe/error.hpp"
#include "dualpipe/planner/report.hpp"
#include "planner/picture.hpp"
#include "planner/text_line.hpp"

namespace dualpipe::planner {
namespace {

using detail::fitted;
using detail::Picture;
using detail::style_of;
using Line = detail::TextLine;

/// Micro-batches are written in one character where 0-9 and a-z are enough for all of them, else in decimal.
class Symbols {
 public:
  explicit Symbols(std::int64_t num_micro_batches)
      : letters_(num_micro_batches <= 36), width_(letters_ ? 1 : std::to_string(num_micro_batches - 1).size()) {}

  std::size_t width() const { return width_; }
  bool letters() const { return letters_; }

  std::string operator()(int micro_batch) const {
    if (!letters_) return std::to_string(micro_batch);
    return std::string(1, "0123456789abcdefghijklmnopqrstuvwxyz"[std::clamp(micro_batch, 0, 35)]);
  }

 private:
  bool letters_;
  std::size_t width_;
};

/// Writes a step into exactly `width` characters.
void write_cell(Line& line, const Step& step, std::size_t width, const Symbols& symbol,
                const std::function<bool(const Op&)>& is_light) {
  const auto style = [&](const Op& op) { return style_of(op, is_light(op)); };
  const std::string own = symbol(step.op.micro_batch);
  if (step.overlapped) {
    // One cell with the shares of both, each in its colour.
    const std::size_t left = std::min(width, own.size() + 1);
    line.text(fitted("{" + own, left), style(step.op));
    std::string right = fitted("&" + symbol(step.overlapped->micro_batch), width - left);
    if (width - left > symbol.width() + 1) right.back() = '}';
    line.text(right, style(*step.overlapped));
    return;
  }
  std::string text;
  switch (step.op.pass) {
    case Pass::Forward:
      text = fitted(own, width);
      break;
    case Pass::Backward:
      text = fitted("[" + own, width);
      if (width > own.size() + 1) text.back() = ']';
      break;
    case Pass::BackwardInput:  // a backward that is not closed yet
      text = fitted("[" + own, width);
      break;
    case Pass::BackwardWeight:  // what it still lacks
      text = fitted("+" + own, width);
      break;
  }
  line.text(text, style(step.op));
}

/// "0-9" or "0 2 4".
std::string ranges(const std::vector<int>& sorted, const Symbols& symbol) {
  std::string out;
  for (std::size_t i = 0; i < sorted.size();) {
    std::size_t last = i;
    while (last + 1 < sorted.size() && sorted[last + 1] == sorted[last] + 1) ++last;
    out += (out.empty() ? "" : " ") + symbol(sorted[i]) + (last > i ? "-" + symbol(sorted[last]) : "");
    i = last + 1;
  }
  return out;
}

/// Which micro-batches start at which rank.
std::string entrances(const Picture& picture, const Symbols& symbol) {
  std::map<int, std::vector<int>> at;
  for (const auto& row : picture.rows)
    for (const auto& step : row.activity.steps) {
      const Op& op = step.interval->step.op;
      if (op.pass == Pass::Forward && op.stage == 0) at[row.rank].push_back(op.micro_batch);
    }
  std::string out;
  for (auto& [rank, micro_batches] : at) {
    std::sort(micro_batches.begin(), micro_batches.end());
    micro_batches.erase(std::unique(micro_batches.begin(), micro_batches.end()), micro_batches.end());
    out += detail::str(out.empty() ? "" : ", ", ranges(micro_batches, symbol), " enter at rank ", rank);
  }
  if (symbol.letters() && picture.num_micro_batches > 10)
    out += detail::str(out.empty() ? "" : "; ", "a = 10",
                       picture.num_micro_batches > 11
                           ? detail::str(" ... ", symbol(static_cast<int>(picture.num_micro_batches - 1)), " = ",
                                         picture.num_micro_batches - 1)
                           : "");
  return out;
}

void write_legend(std::string& out, const Picture& picture, const Symbols& symbol, std::size_t indent, bool color) {
  // Only what occurs.
  bool pair = false;
  std::map<Pass, bool> seen;
  for (const auto& row : picture.rows)
    for (const auto& [interval, whole] : row.activity.steps) {
      pair = pair || interval->step.overlapped;
      if (!interval->step.overlapped) seen[interval->step.op.pass] = true;
    }
  const std::size_t unit = symbol.width() + 1;
  Line line;
  line.pad_to(indent);
  const auto entry = [&](const Step& step, std::size_t width, const std::string& meaning) {
    write_cell(line, step, width, symbol, [](const Op& op) { return op.stage != 0; });
    line.text(" " + meaning + "   ");
  };
  if (seen[Pass::Forward]) entry({{Pass::Forward, 0, 0}, {}}, unit, "forward");
  if (seen[Pass::Backward]) entry({{Pass::Backward, 0, 0}, {}}, 2 * unit, "backward");
  if (seen[Pass::BackwardInput]) entry({{Pass::BackwardInput, 0, 0}, {}}, unit, "backward, input part");
  if (seen[Pass::BackwardWeight]) entry({{Pass::BackwardWeight, 0, 0}, {}}, unit, "weight part");
  if (pair) entry({{Pass::Forward, 0, 1}, Op{Pass::Backward, 0, 0}}, 3 * unit, "forward 1 and backward 0 overlapped");
  line.text("... idle");
  out += line.str(color);
  if (const std::string text = entrances(picture, symbol); !text.empty())
    out += Line().pad_to(indent).text("micro-batches " + text).str(color);
  if (const std::string text = picture.shades(); color && !text.empty())
    out += Line().pad_to(indent).text(text).str(color);
}

}  // namespace

std::string to_ascii(const Timeline& timeline, const PictureOptions& options) {
  const Picture picture(timeline, options);
  if (options.lanes) return lanes_to_ascii(timeline, picture, options);
  const Symbols symbol(picture.num_micro_batches);
  const std::size_t width = std::to_string(std::max(0, timeline.num_ranks - 1)).size();
  const detail::Columns column{picture, 5 + width + 2, static_cast<double>(symbol.width() + 1) / picture.unit};

  std::string out = column.axis(timeline.seconds_per_unit, options.color);
  for (const auto& row : picture.rows) {
    const std::string index = std::to_string(row.rank);
    Line line;
    line.text("rank " + std::string(width - index.size(), ' ') + index).pad_to(column.indent);
    const auto is_light = [&](const Op& op) { return picture.second_half(row.rank, op); };
    for (const auto& step : row.activity.steps) {
      const Window shown = picture.shown(*step.interval);
      line.pad_to(column(shown.begin), '.');
      // If measured steps overlap by less than a column, the later one is shortened.
      const std::size_t end = column(shown.end);
      if (end > line.size()) write_cell(line, step.interval->step, end - line.size(), symbol, is_light);
    }
    line.pad_to(column(picture.end), '.');
    out += line.str(options.color);
    if (!options.marks.empty()) out += mark_line(options.marks, row.rank, column);
  }
  write_legend(out, picture, symbol, column.indent, options.color);
  for (const std::string& note : options.notes) out += note + "\n";
  return out;
}

}  // namespace dualpipe::planner
