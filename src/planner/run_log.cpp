#include "dualpipe/planner/run_log.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <utility>

#include "dualpipe/error.hpp"
#include "planner/json.hpp"
#include "planner/picture.hpp"
#include "planner/svg_canvas.hpp"

namespace dualpipe::planner {
namespace {

using nlohmann::json;

constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();

void read_line(std::string_view line, RunLog& log) {
  const json object = detail::parse_json(line);
  DUALPIPE_CHECK(object.is_object() && object.contains("step"), "must be an object with a step, got ",
                 detail::brief(object));
  const json& step = object["step"];
  DUALPIPE_CHECK(step.is_number_unsigned() && step.get<std::uint64_t>() <= std::uint64_t{1} << 53,
                 "step must be an integer from 0 to 2^53, got ", detail::brief(step));
  const auto number = step.get<std::int64_t>();
  DUALPIPE_CHECK(log.steps.empty() || number > log.steps.back(), "step ", number, " comes after step ",
                 log.steps.back());
  for (const auto& [key, value] : object.items()) {
    if (key == "step") continue;
    DUALPIPE_CHECK(value.is_number() || value.is_null(), detail::brief(key), " must be a number or null, got ",
                   detail::brief(value));
    std::vector<double>& values = log.values[key];
    values.resize(log.steps.size(), not_a_number);  // of the steps before, which had none
    values.push_back(value.is_number() ? value.get<double>() : not_a_number);
  }
  log.steps.push_back(number);
  for (auto& [key, values] : log.values) values.resize(log.steps.size(), not_a_number);
}

// Pixels.
constexpr double run_margin = 12, run_width = 940, axis_width = 58, axis_space = 24, head_space = 24, panel_gap = 10;
constexpr double greatest_drawn = 1e300;  // sums of more would overflow
constexpr double loss_height = 300, small_height = 110;
constexpr std::array run_colors{"#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f"};

/// What an axis shows.
struct Extent {
  double least = std::numeric_limits<double>::infinity(), greatest = -least;
  bool is_empty() const { return least > greatest; }
  double length() const { return greatest - least; }
  void include(double value) {
    if (!std::isfinite(value)) return;
    least = std::min(least, value);
    greatest = std::max(greatest, value);
  }
  /// With some room, also where all values are one.
  Extent padded() const {
    const double size = std::max(std::abs(least), std::abs(greatest));
    const double room = length() > 0 ? std::max({length() * 0.04, size * 1e-9, 1e-30}) : std::max(size * 0.1, 1e-12);
    return {least - room, greatest + room};
  }
};

/// About `count` round numbers within the extent.
std::vector<double> ticks(const Extent& extent, int count) {
  const double rough = extent.length() / count;
  const double power = std::pow(10, std::floor(std::log10(rough)));
  double step = 10 * power;
  for (const double factor : {5.0, 2.0, 1.0})
    if (rough <= factor * power) step = factor * power;
  std::vector<double> found;
  for (double k = std::ceil(extent.least / step); k * step <= extent.greatest && std::ssize(found) <= 2 * count; ++k)
    found.push_back(k * step);
  return found;
}

/// The same value of all runs, over their steps.
class Curves {
 public:
  Curves(const std::vector<RunLog>& runs, std::string key, std::string title)
      : runs_(runs), key_(std::move(key)), title_(std::move(title)) {
    for (const RunLog& run : runs)
      for (const double value : values_of(run)) range_.include(value);
    DUALPIPE_CHECK(is_empty() || std::max(-range_.least, range_.greatest) <= greatest_drawn, "cannot draw values of ",
                   title_, " from ", range_.least, " to ", range_.greatest);
  }

  bool is_empty() const { return range_.is_empty(); }

  void draw(detail::Canvas& canvas, const Extent& steps, double left, double top, double width, double height) const {
    const double inner = left + axis_width, right = left + width, bottom = top + head_space + height;
    const Extent shown = range_.padded();
    const auto x = [&](double step) { return inner + (step - steps.least) / steps.length() * (right - inner); };
    const auto y = [&](double value) { return bottom - (value - shown.least) / shown.length() * height; };
    canvas.text(inner, top + head_space - 8, title_, " font-size=\"12\" font-weight=\"bold\"");
    canvas.rect(inner, top + head_space, right - inner, height, "#fafafa");
    for (const double value : ticks(shown, height > small_height ? 6 : 3)) {
      canvas.line(inner, y(value), right, y(value), "#e4e4e4");
      canvas.text(inner - 5, y(value) + 3.4, detail::number(std::abs(value) < shown.length() * 1e-9 ? 0 : value),
                  " text-anchor=\"end\"");
    }
    for (const double step : ticks(steps, width > run_width / 2 + 1 ? 10 : 5)) {
      if (step != std::floor(step)) continue;
      canvas.line(x(step), bottom, x(step), bottom + 4, "#888888");
      canvas.text(x(step), bottom + 15, std::to_string(static_cast<std::int64_t>(step)), detail::centred);
    }
    for (std::size_t i = 0; i < runs_.size(); ++i) {
      const std::vector<double>& values = values_of(runs_[i]);
      std::vector<std::pair<double, double>> piece;
      const auto finish = [&] {
        if (piece.size() == 1) piece.emplace_back(piece[0].first + 1.5, piece[0].second);  // a step alone is seen too
        if (!piece.empty()) canvas.polyline(thinned(piece), run_colors[i % run_colors.size()]);
        piece.clear();
      };
      for (std::size_t k = 0; k < values.size(); ++k) {
        if (std::isfinite(values[k]))
          piece.emplace_back(x(static_cast<double>(runs_[i].steps[k])), y(values[k]));
        else
          finish();
      }
      finish();
    }
  }

 private:
  using Points = std::vector<std::pair<double, double>>;

  const std::vector<double>& values_of(const RunLog& run) const {
    static const std::vector<double> none;
    const auto found = run.values.find(key_);
    return found == run.values.end() ? none : found->second;
  }

  /// First, highest, lowest and last of the points that share a pixel.
  static Points thinned(const Points& points) {
    Points kept;
    for (std::size_t begin = 0; begin < points.size();) {
      std::size_t end = begin, low = begin, high = begin;
      for (; end < points.size() && std::floor(points[end].first) == std::floor(points[begin].first); ++end) {
        if (points[end].second < points[low].second) low = end;
        if (points[end].second > points[high].second) high = end;
      }
      std::array<std::size_t, 4> chosen{begin, low, high, end - 1};
      std::sort(chosen.begin(), chosen.end());
      for (std::size_t i = 0; i < chosen.size(); ++i)
        if (i == 0 || chosen[i] != chosen[i - 1]) kept.push_back(points[chosen[i]]);
      begin = end;
    }
    return kept;
  }

  const std::vector<RunLog>& runs_;
  std::string key_, title_;
  Extent range_;
};

}  // namespace

RunLog read_run_log(std::string_view text, std::string name) {
  RunLog log;
  log.name = std::move(name);
  for (std::int64_t number = 1; !text.empty(); ++number) {
    const std::size_t end = text.find('\n');
    const std::string_view line = text.substr(0, end);
    text.remove_prefix(end == std::string_view::npos ? text.size() : end + 1);
    try {
      read_line(line, log);
    } catch (const InvalidArgument& error) {
      throw InvalidArgument(detail::str(log.name, ", line ", number, ": ", error.what()));
    }
  }
  return log;
}

std::string to_svg(const std::vector<RunLog>& runs) {
  const Curves loss(runs, "loss", "loss"), rate(runs, "learning_rate", "learning rate"),
      norm(runs, "gradient_norm", "gradient norm");
  DUALPIPE_CHECK(!loss.is_empty() || !rate.is_empty() || !norm.is_empty(),
                 "nothing to draw: no line has a number as loss, learning_rate or gradient_norm");
  Extent steps;
  for (const RunLog& run : runs)
    for (const std::int64_t step : run.steps) steps.include(static_cast<double>(step));
  if (steps.length() == 0) steps.greatest += 1;

  detail::Canvas canvas;
  double x = run_margin + axis_width;
  for (std::size_t i = 0; i < runs.size(); ++i) {
    canvas.rect(x, run_margin + 4, 14, 3, run_colors[i % run_colors.size()]);
    canvas.text(x + 19, run_margin + 9, runs[i].name);
    x += 19 + detail::digit_width * static_cast<double>(runs[i].name.size()) + 18;
  }
  double y = run_margin + 14;
  if (!loss.is_empty()) {
    loss.draw(canvas, steps, run_margin, y, run_width, loss_height);
    y += head_space + loss_height + axis_space;
  }
  std::vector<const Curves*> small;
  for (const Curves* curves : {&rate, &norm})
    if (!curves->is_empty()) small.push_back(curves);
  const double each = (run_width - panel_gap) / 2;
  for (std::size_t i = 0; i < small.size(); ++i)
    small[i]->draw(canvas, steps, run_margin + static_cast<double>(i) * (each + panel_gap), y, each, small_height);
  if (!small.empty()) y += head_space + small_height + axis_space;
  return canvas.document(std::max(run_width + 3 * run_margin, x), y + 4);
}

}  // namespace dualpipe::planner
