#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "dualpipe/detail/schedule/pass_name.hpp"
#include "dualpipe/error.hpp"
#include "dualpipe/planner/render.hpp"
#include "dualpipe/planner/report.hpp"
#include "planner/picture.hpp"
#include "planner/svg_canvas.hpp"

namespace dualpipe::planner {
namespace {

using detail::Canvas;
using detail::centred;
using detail::digit_width;
using detail::fill_of;
using detail::font_size;
using detail::Picture;

// Pixels.
constexpr double bar_height = 17, strip_height = 3, row_gap = 5, mark_height = 11;
constexpr double least_name_width = 40;  // where there is less room, numbers say more
constexpr double exposed_height = 3, lane_height = 12, lane_gap = 1;
constexpr double margin = 12, title_height = 30, axis_height = 26, legend_height = 30, note_height = 15, gap = 18;
constexpr double min_width = 1040, max_width = 16000;
constexpr const char* exposed_fill = "#d62728";
constexpr const char* transfer_fill = "#7b4fb0";
constexpr const char* reduction_fill = "#1f8a5b";
constexpr const char* frame = " stroke=\"#222222\" stroke-width=\"0.9\"";
constexpr const char* see_through = " fill-opacity=\"0.6\"";

double text_width(const std::string& text) { return digit_width * 0.9 * static_cast<double>(text.size()); }

/// One op's share of a step, with its micro-batch where there is room.
void draw_share(Canvas& canvas, const Op& op, bool light, double x, double y, double width) {
  canvas.rect(x, y, width, bar_height, fill_of(op.pass, light));
  const std::string label = std::to_string(op.micro_batch);
  if (width >= digit_width * static_cast<double>(label.size()))
    canvas.text(x + width / 2, y + bar_height / 2 + font_size * 0.36, label, centred);
}

/// Title, rows, axis.
class Panel {
 public:
  Panel(const Timeline& timeline, const Picture& picture, const std::vector<Mark>& marks, double left, double scale)
      : timeline_(timeline), picture_(picture), marks_(marks), left_(left), scale_(scale) {
    bar_top_ = marks.empty() ? 0 : mark_height + 1;
    lanes_top_ = bar_top_ + bar_height + 1;
    strip_top_ = lanes_top_ + (picture.lanes ? exposed_height + 2 * (lane_height + lane_gap) + 1 : 0);
    row_height_ = strip_top_ + strip_height + (picture.lanes || !marks.empty() ? 2 * row_gap : row_gap) - 4;
  }

  double height() const { return title_height + row_height_ * num_rows() + axis_height; }

  void draw(Canvas& canvas, double top) const {
    const double rows = top + title_height;
    canvas.text(left_, top + title_height - 12, title(), " font-size=\"13\" font-weight=\"bold\"");
    draw_axis(canvas, rows, rows + row_height_ * num_rows());
    double y = rows;
    for (const Picture::Row& row : picture_.rows) {
      draw_row(canvas, row, y);
      y += row_height_;
    }
  }

 private:
  double num_rows() const { return static_cast<double>(picture_.rows.size()); }
  double x(double time) const { return left_ + (time - picture_.begin) * scale_; }

  void draw_row(Canvas& canvas, const Picture::Row& row, double top) const {
    const double right = x(picture_.end);
    for (const Mark& mark : marks_)
      if (mark.rank == row.rank) draw_mark(canvas, mark, top);

    const double bar = top + bar_top_;
    canvas.text(left_ - 6, bar + bar_height / 2 + font_size * 0.36, detail::str("rank ", row.rank),
                " text-anchor=\"end\"");
    canvas.rect(left_, bar, right - left_, bar_height, "#f1f1f1");
    for (const detail::ActiveStep& step : row.activity.steps) {
      const auto [begin, end] = picture_.shown(*step.interval);
      canvas.open(to_string(step.interval->step) + ", " + span(*step.interval));
      if (step.whole) {
        draw_step(canvas, row.rank, step.interval->step, x(begin), bar, (end - begin) * scale_);
      } else {
        canvas.rect(x(begin), bar, (end - begin) * scale_, bar_height, "#dcdcdc",
                    step.interval->step.overlapped ? frame : " stroke=\"#999999\" stroke-width=\"0.6\"");
      }
      canvas.close();
    }
    for (const Interval* node : row.nodes) draw_named(canvas, row.rank, *node, bar + 1.5, bar_height - 3);
    if (picture_.lanes) draw_collectives(canvas, row, top + lanes_top_);
    // What lies outside of the computing would run out of the picture, so it is cut.
    const auto draw_strips = [&](const std::vector<const Interval*>& intervals, const char* fill) {
      for (const Interval* interval : intervals) {
        const auto [begin, end] = picture_.shown(*interval);
        canvas.rect(x(begin), top + strip_top_, (end - begin) * scale_, strip_height, fill, see_through);
      }
    };
    draw_strips(row.transfers, transfer_fill);
    draw_strips(row.reductions, reduction_fill);
  }

  void draw_step(Canvas& canvas, int rank, const Step& step, double x, double y, double width) const {
    const auto share = [&](const Op& op, double from, double part) {
      draw_share(canvas, op, picture_.second_half(rank, op), from, y, part);
    };
    if (!step.overlapped) {
      share(step.op, x, width);
      canvas.rect(x, y, width, bar_height, "none", " stroke=\"#ffffff\" stroke-width=\"0.8\"");
      return;
    }
    // Side by side in the proportion of forward to backward, and framed as one: both run during the whole of it.
    share(step.op, x, width / 3);
    share(*step.overlapped, x + width / 3, width * 2 / 3);
    canvas.rect(x + 0.4, y, std::max(0.0, width - 0.8), bar_height, "none", frame);
  }

  void draw_collectives(Canvas& canvas, const Picture::Row& row, double top) const {
    const detail::TimeSpans exposed = detail::clipped(detail::without(row.activity.collectives, row.activity.computing),
                                                      {picture_.begin, picture_.end});
    for (const auto& [begin, end] : exposed)
      canvas.rect(x(begin), top, (end - begin) * scale_, exposed_height - 1, exposed_fill);
    for (const bool forward : {true, false}) {
      const double lane = top + exposed_height + (forward ? 0 : lane_height + lane_gap);
      canvas.text(left_ - 6, lane + lane_height / 2 + 3, forward ? "forward's" : "backward's",
                  " text-anchor=\"end\" font-size=\"8\" fill=\"#777777\"");
      canvas.rect(left_, lane, x(picture_.end) - left_, lane_height, "#f8f8f8");
      for (const Interval* collective : row.collectives)
        if ((collective->step.op.pass == Pass::Forward) == forward)
          draw_named(canvas, row.rank, *collective, lane, lane_height);
    }
  }

  /// With as much of name and micro-batch as there is room for.
  void draw_named(Canvas& canvas, int rank, const Interval& interval, double y, double height) const {
    const auto [begin, end] = picture_.shown(interval);
    const Op op = detail::colored_op(interval);
    const double width = (end - begin) * scale_;
    canvas.open(
        detail::str(interval.node, interval.node.empty() ? "" : ", ", to_string(interval.step), ", ", span(interval)));
    canvas.rect(x(begin), y, width, height, fill_of(op.pass, picture_.second_half(rank, op)),
                width > 3 ? " stroke=\"#ffffff\" stroke-width=\"0.5\"" : "");
    const std::string number = std::to_string(op.micro_batch);
    const std::string name = detail::node_label(interval);
    for (const std::string& label : {picture_.one_pair ? name : name + " " + number, name, interval.node, number}) {
      if (label.empty() || text_width(label) + 2 > width || (label != number && width < least_name_width)) continue;
      canvas.text(x(begin) + width / 2, y + height / 2 + font_size * 0.34, label, centred);
      break;
    }
    canvas.close();
  }

  void draw_mark(Canvas& canvas, const Mark& mark, double top) const {
    const double begin = std::clamp(mark.window.begin, picture_.begin, picture_.end);
    const double end = std::clamp(mark.window.end, picture_.begin, picture_.end);
    if (begin >= end) return;
    canvas.rect(x(begin) + 0.5, top, (end - begin) * scale_ - 1, mark_height, "#444444", " rx=\"3\"");
    canvas.text(x(begin) + (end - begin) * scale_ / 2, top + mark_height - 2.4, mark.text,
                " text-anchor=\"middle\" fill=\"#ffffff\" font-size=\"9\" font-weight=\"bold\"");
  }

  std::string unit() const { return timeline_.seconds_per_unit == 0 ? "" : " s"; }
  double seconds(double time) const {
    return timeline_.seconds_per_unit == 0 ? time : time * timeline_.seconds_per_unit;
  }

  std::string span(const Interval& interval) const {
    return detail::number(seconds(interval.begin - picture_.origin)) + " to " +
           detail::number(seconds(interval.end - picture_.origin)) + unit();
  }

  std::string title() const {
    const Window whole = extent(timeline_);
    const bool part = picture_.begin != whole.begin || picture_.end != whole.end;
    return detail::str(timeline_.name, timeline_.name.empty() ? "" : ": ", timeline_.num_ranks,
                       timeline_.num_ranks == 1 ? " rank, " : " ranks, ", picture_.num_micro_batches,
                       picture_.num_micro_batches == 1 ? " micro-batch, makespan " : " micro-batches, makespan ",
                       detail::number(seconds(whole.length())), unit(),
                       part ? detail::str("; shown from ", detail::number(seconds(picture_.begin - picture_.origin)),
                                          " to ", detail::number(seconds(picture_.end - picture_.origin)), unit())
                            : "");
  }

  void draw_axis(Canvas& canvas, double top, double bottom) const {
    if (picture_.length() <= 0) return;
    const double to_unit = timeline_.seconds_per_unit == 0 ? 1 : timeline_.seconds_per_unit;
    const double tick = detail::round_step(70 / scale_ * to_unit);
    const double first = (picture_.begin - picture_.origin) * to_unit,
                 last = (picture_.end - picture_.origin) * to_unit;
    const double little = 1e-9 * (last - first);
    for (auto i = static_cast<std::int64_t>(std::ceil((first - little) / tick));
         static_cast<double>(i) * tick <= last + little; ++i) {
      const double value = static_cast<double>(i) * tick, at = x(picture_.origin + value / to_unit);
      canvas.line(at, top, at, bottom + 3, "#bbbbbb");
      canvas.text(at, bottom + 14, detail::number(value) + unit(), centred);
    }
  }

  const Timeline& timeline_;
  const Picture& picture_;
  const std::vector<Mark>& marks_;
  double left_, scale_;
  double bar_top_, lanes_top_, strip_top_, row_height_;  // within a row
};

/// The shortest step of a computed timeline; in a measured one that may be a thousandth of the others, so at least half
/// their mean.
double short_step(const Picture& picture) {
  double sum = 0;
  std::size_t count = 0;
  for (const Picture::Row& row : picture.rows) {
    for (const auto& [interval, whole] : row.activity.steps) sum += interval->end - interval->begin;
    count += row.activity.steps.size();
  }
  const double mean = count > 0 ? sum / static_cast<double>(count) : 0;
  // The nodes of a step must be visible too.
  return std::max(picture.unit, mean / 2) / (picture.lanes ? 3 : 1);
}

/// What the passes, frames and strips mean, of what occurs.
class Legend {
 public:
  Legend(Canvas& canvas, double x, double y) : canvas_(canvas), x_(x), y_(y) {}

  void draw(const std::vector<Picture>& pictures) {
    bool shades = false, pairs = false, lanes = false, transfers = false, reductions = false;
    std::array<bool, 4> seen{};
    constexpr std::array passes{Pass::Forward, Pass::Backward, Pass::BackwardInput, Pass::BackwardWeight};
    const auto see = [&](Pass pass) { seen[std::find(passes.begin(), passes.end(), pass) - passes.begin()] = true; };
    for (const Picture& picture : pictures) {
      shades = shades || picture.second_halves;
      lanes = lanes || picture.lanes;
      transfers = transfers || picture.transfers;
      reductions = reductions || picture.reductions;
      for (const Picture::Row& row : picture.rows) {
        for (const auto& [interval, whole] : row.activity.steps) {
          pairs = pairs || interval->step.overlapped;
          if (!whole) continue;
          see(interval->step.op.pass);
          if (interval->step.overlapped) see(interval->step.overlapped->pass);
        }
        for (const auto* intervals : {&row.nodes, &row.collectives})
          for (const Interval* interval : *intervals) see(detail::colored_op(*interval).pass);
      }
    }
    for (std::size_t i = 0; i < passes.size(); ++i)
      if (seen[i]) pass(passes[i], shades);
    if (pairs) {
      canvas_.rect(x_, y_, 14, 15, fill_of(Pass::Forward, false));
      canvas_.rect(x_ + 14, y_, 28, 15, fill_of(Pass::Backward, shades));
      canvas_.rect(x_, y_, 42, 15, "none", " stroke=\"#222222\"");
      x_ += 48;
      label("overlapped");
    }
    if (lanes) strip(exposed_fill, "", "exposed communication");
    if (transfers) strip(transfer_fill, see_through, "send, receive");
    if (reductions) strip(reduction_fill, see_through, "sum of gradients");
    for (std::size_t i = 0; i < pictures.size(); ++i) {
      const std::string text = pictures[i].shades();
      if (!text.empty() && (i == 0 || text != pictures[i - 1].shades())) label(text);
    }
  }

  double right() const { return x_; }

 private:
  void label(const std::string& text) {
    canvas_.text(x_, y_ + 12, text);
    x_ += text_width(text) + 18;
  }
  void pass(Pass pass, bool shades) {
    canvas_.rect(x_, y_, 14, 15, fill_of(pass, false));
    if (shades) canvas_.rect(x_ + 14, y_, 14, 15, fill_of(pass, true));
    x_ += shades ? 34 : 20;
    label(detail::pass_name(pass));
  }
  void strip(const char* fill, const char* more, const std::string& text) {
    canvas_.rect(x_, y_ + 6, 24, strip_height, fill, more);
    x_ += 30;
    label(text);
  }

  Canvas& canvas_;
  double x_, y_;
};

}  // namespace

std::string to_svg(const std::vector<Timeline>& timelines, const PictureOptions& options) {
  DUALPIPE_CHECK(!timelines.empty(), "a picture needs at least one timeline");
  std::vector<Picture> pictures;
  for (const Timeline& timeline : timelines) pictures.emplace_back(timeline, options);

  // Wide enough for the digits of a micro-batch in short steps.
  double width = min_width, longest = 0;
  bool one_unit = true, lanes = false;
  std::int64_t num_ranks = 0;
  for (std::size_t i = 0; i < timelines.size(); ++i) {
    const Picture& picture = pictures[i];
    const auto digits =
        static_cast<double>(std::to_string(std::max(std::int64_t{0}, picture.num_micro_batches - 1)).size());
    width = std::max(width, picture.length() / short_step(picture) * (digit_width * digits + 3));
    longest = std::max(longest, picture.length());
    one_unit = one_unit && timelines[i].seconds_per_unit == timelines.front().seconds_per_unit;
    lanes = lanes || picture.lanes;
    num_ranks = std::max(num_ranks, picture.num_ranks);
  }
  width = std::min(width, max_width);
  const std::string widest_name = "rank " + std::to_string(std::max(std::int64_t{0}, num_ranks - 1));
  const double left = margin + digit_width * static_cast<double>(widest_name.size() + 1) + (lanes ? 10 : 0);

  Canvas canvas;
  double y = 0;
  const std::vector<Mark> none;
  for (std::size_t i = 0; i < timelines.size(); ++i) {
    const double length = one_unit ? longest : pictures[i].length();
    const Panel panel(timelines[i], pictures[i], i == 0 ? options.marks : none, left, length > 0 ? width / length : 0);
    panel.draw(canvas, y);
    y += panel.height() + gap;
  }
  Legend legend(canvas, left, y - gap + 8);
  legend.draw(pictures);
  y += legend_height + 8 - gap;
  for (const std::string& note : options.notes) {
    canvas.text(left, y + 6, note, " font-family=\"monospace\" font-size=\"11\" xml:space=\"preserve\"");
    y += note_height;
  }
  return canvas.document(std::max(left + width + margin, legend.right()), options.notes.empty() ? y : y + 8);
}

}  // namespace dualpipe::planner
