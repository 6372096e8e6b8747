#include "dualpipe/schedule/render.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "dualpipe/error.hpp"
#include "schedule/picture.hpp"

namespace dualpipe {
namespace {

using detail::Picture;

/// Background of a cell; two for each pass, the second for the rank's other stages.
enum class Style : unsigned char { none, forward, forward2, backward, backward2, input, input2, weight, weight2 };

constexpr std::array<const char*, 9> escapes{"\x1b[0m",           "\x1b[30;48;5;75m",  "\x1b[30;48;5;153m",
                                             "\x1b[30;48;5;71m",  "\x1b[30;48;5;157m", "\x1b[30;48;5;37m",
                                             "\x1b[30;48;5;123m", "\x1b[30;48;5;178m", "\x1b[30;48;5;229m"};

Style style_of(int rank, const Op& op) {
  Style first = Style::backward;
  if (op.pass == Pass::Forward) first = Style::forward;
  if (op.pass == Pass::BackwardInput) first = Style::input;
  if (op.pass == Pass::BackwardWeight) first = Style::weight;
  return static_cast<Style>(static_cast<int>(first) + (Picture::second_half(rank, op) ? 1 : 0));
}

/// One line of characters, each with its style.
class Line {
 public:
  Line& text(const std::string& characters, Style style = Style::none) {
    characters_ += characters;
    styles_.resize(characters_.size(), style);
    return *this;
  }
  Line& pad_to(std::size_t width, char fill = ' ') {
    if (characters_.size() < width) text(std::string(width - characters_.size(), fill));
    return *this;
  }
  std::size_t size() const { return characters_.size(); }

  std::string str(bool color) const {
    if (!color) return characters_.substr(0, characters_.find_last_not_of(' ') + 1) + "\n";
    std::string out;
    Style current = Style::none;
    for (std::size_t i = 0; i < characters_.size(); ++i) {
      if (styles_[i] != current) out += escapes[static_cast<std::size_t>(current = styles_[i])];
      out += characters_[i];
    }
    return out + (current == Style::none ? "\n" : "\x1b[0m\n");
  }

 private:
  std::string characters_;
  std::vector<Style> styles_;
};

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

std::string fitted(std::string text, std::size_t width) {
  text.resize(width, ' ');
  return text;
}

/// Writes a step into exactly `width` characters.
void write_cell(Line& line, int rank, const Step& step, std::size_t width, const Symbols& symbol) {
  const std::string own = symbol(step.op.micro_batch);
  if (step.overlapped) {
    // One cell with the shares of both, each in its colour.
    const std::size_t left = std::min(width, own.size() + 1);
    line.text(fitted("{" + own, left), style_of(rank, step.op));
    std::string right = fitted("&" + symbol(step.overlapped->micro_batch), width - left);
    if (width - left > symbol.width() + 1) right.back() = '}';
    line.text(right, style_of(rank, *step.overlapped));
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
  line.text(text, style_of(rank, step.op));
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
  for (std::size_t rank = 0; rank < picture.steps.size(); ++rank)
    for (const Interval* interval : picture.steps[rank]) {
      const Op& op = interval->step.op;
      if (op.pass == Pass::Forward && op.stage == 0) at[static_cast<int>(rank)].push_back(op.micro_batch);
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
  for (const auto& rank : picture.steps)
    for (const Interval* interval : rank) {
      pair = pair || interval->step.overlapped;
      if (!interval->step.overlapped) seen[interval->step.op.pass] = true;
    }
  const std::size_t unit = symbol.width() + 1;
  Line line;
  line.pad_to(indent);
  const auto entry = [&](const Step& step, std::size_t width, const std::string& meaning) {
    write_cell(line, step.op.stage, step, width, symbol);
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

std::string to_ascii(const Timeline& timeline, bool color) {
  const Picture picture(timeline);
  const Symbols symbol(picture.num_micro_batches);
  const double columns_per_time = static_cast<double>(symbol.width() + 1) / picture.unit;
  const std::size_t width = std::to_string(std::max(0, timeline.num_ranks - 1)).size();
  const std::size_t indent = 5 + width + 2;
  const auto column = [&](double time) {
    return indent + static_cast<std::size_t>(std::llround((time - picture.begin) * columns_per_time));
  };

  std::string out;
  const bool seconds = timeline.seconds_per_unit != 0;
  const double shown = seconds ? timeline.seconds_per_unit : 1;  // of one unit
  const double tick = detail::round_step(10 / columns_per_time * shown);
  Line axis;
  axis.text(seconds ? "time/s" : "time");
  for (int i = 0; i * tick <= (picture.end - picture.begin) * shown * (1 + 1e-9); ++i) {
    const std::size_t at = column(picture.begin + i * tick / shown);
    if (at > axis.size()) axis.pad_to(at).text(detail::number(i * tick));
  }
  out += axis.str(color);

  for (int rank = 0; rank < timeline.num_ranks; ++rank) {
    const std::string index = std::to_string(rank);
    Line line;
    line.text("rank " + std::string(width - index.size(), ' ') + index).pad_to(indent);
    for (const Interval* interval : picture.steps[static_cast<std::size_t>(rank)]) {
      line.pad_to(column(interval->begin), '.');
      // Where measured steps seem to overlap by less than a column, the later one gives way.
      const std::size_t end = column(interval->end);
      if (end > line.size()) write_cell(line, rank, interval->step, end - line.size(), symbol);
    }
    line.pad_to(column(picture.end), '.');
    out += line.str(color);
  }
  write_legend(out, picture, symbol, indent, color);
  return out;
}

}  // namespace dualpipe
