#include "planner/text_line.hpp"

#include <algorithm>
#include <cmath>

namespace dualpipe::detail {
namespace {

constexpr std::array<const char*, 9> escapes{"\x1b[0m",           "\x1b[30;48;5;75m",  "\x1b[30;48;5;153m",
                                             "\x1b[30;48;5;71m",  "\x1b[30;48;5;157m", "\x1b[30;48;5;37m",
                                             "\x1b[30;48;5;123m", "\x1b[30;48;5;178m", "\x1b[30;48;5;229m"};

}  // namespace

Style style_of(const Op& op, bool light) {
  Style first = Style::backward;
  if (op.pass == Pass::Forward) first = Style::forward;
  if (op.pass == Pass::BackwardInput) first = Style::input;
  if (op.pass == Pass::BackwardWeight) first = Style::weight;
  return static_cast<Style>(static_cast<int>(first) + (light ? 1 : 0));
}

TextLine& TextLine::text(const std::string& characters, Style style) {
  characters_ += characters;
  styles_.resize(characters_.size(), style);
  return *this;
}

TextLine& TextLine::pad_to(std::size_t width, char fill) {
  if (characters_.size() < width) text(std::string(width - characters_.size(), fill));
  return *this;
}

std::string TextLine::str(bool color) const {
  if (!color) return characters_.substr(0, characters_.find_last_not_of(' ') + 1) + "\n";
  std::string out;
  Style current = Style::none;
  for (std::size_t i = 0; i < characters_.size(); ++i) {
    if (styles_[i] != current) out += escapes[static_cast<int>(current = styles_[i])];
    out += characters_[i];
  }
  return out + (current == Style::none ? "\n" : "\x1b[0m\n");
}

std::string fitted(std::string text, std::size_t width) {
  text.resize(width, ' ');
  return text;
}

std::size_t Columns::operator()(double time) const { return indent + std::llround((time - picture.begin) * per_time); }

std::string Columns::axis(double seconds_per_unit, bool color) const {
  const bool seconds = seconds_per_unit != 0;
  const double shown = seconds ? seconds_per_unit : 1;  // of one unit
  const double tick = round_step(10 / per_time * shown);
  TextLine line;
  line.text(seconds ? "time/s" : "time");
  const double first = (picture.begin - picture.origin) * shown, last = (picture.end - picture.origin) * shown;
  for (auto i = static_cast<std::int64_t>(std::ceil(first / tick - 1e-9));
       static_cast<double>(i) * tick <= last + 1e-9 * (last - first); ++i) {
    const double value = static_cast<double>(i) * tick;
    const std::size_t at = (*this)(std::max(picture.begin, picture.origin + value / shown));
    if (at > line.size()) line.pad_to(at).text(number(value));
  }
  return line.str(color);
}

std::string mark_line(const std::vector<planner::Mark>& marks, int rank, const Columns& column) {
  TextLine line;
  line.pad_to(column.indent);
  for (const planner::Mark& mark : marks) {
    if (mark.rank != rank) continue;
    const std::size_t begin = column(std::clamp(mark.window.begin, column.picture.begin, column.picture.end));
    const std::size_t end = column(std::clamp(mark.window.end, column.picture.begin, column.picture.end));
    if (end > begin && begin >= line.size()) line.pad_to(begin).text(mark.text).pad_to(end, '-');
  }
  return line.str(false);
}

}  // namespace dualpipe::detail
