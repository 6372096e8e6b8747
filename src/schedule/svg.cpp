#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "dualpipe/error.hpp"
#include "dualpipe/schedule/render.hpp"
#include "schedule/picture.hpp"

namespace dualpipe {
namespace {

using detail::Picture;

// Pixels.
constexpr double row_height = 22, bar_height = 17, strip_height = 3;
constexpr double margin = 12, title_height = 30, axis_height = 26, legend_height = 30, gap = 18;
constexpr double digit_width = 5.6, font_size = 9.5;
constexpr double min_width = 1040, max_width = 16000;

/// Fill of a pass: dark for a rank's first stage, light for its others.
const char* fill(Pass pass, bool light) {
  switch (pass) {
    case Pass::Forward:
      return light ? "#a9cdf0" : "#5b9bd8";
    case Pass::Backward:
      return light ? "#b5e0b0" : "#63b55f";
    case Pass::BackwardInput:
      return light ? "#a5e3df" : "#3fb3ad";
    case Pass::BackwardWeight:
      break;
  }
  return light ? "#f6e0a0" : "#e2b13c";
}

std::string escaped(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (c == '&')
      out += "&amp;";
    else if (c == '<')
      out += "&lt;";
    else if (c == '>')
      out += "&gt;";
    else if (c == '"')
      out += "&quot;";
    else if (static_cast<unsigned char>(c) >= 0x20)
      out += c;
  }
  return out;
}

/// A length or position to a hundredth of a pixel.
std::string px(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.2f", value);
  std::string out = text;
  out.erase(out.find_last_not_of('0') + 1);
  if (out.back() == '.') out.pop_back();
  return out;
}

class Canvas {
 public:
  void rect(double x, double y, double width, double height, const char* fill, const char* more = "") {
    body_ += "<rect x=\"" + px(x) + "\" y=\"" + px(y) + "\" width=\"" + px(width) + "\" height=\"" + px(height) +
             "\" fill=\"" + fill + "\"" + more + "/>\n";
  }
  void text(double x, double y, const std::string& text, const char* more = "") {
    body_ += "<text x=\"" + px(x) + "\" y=\"" + px(y) + "\"" + more + ">" + escaped(text) + "</text>\n";
  }
  void line(double x1, double y1, double x2, double y2, const char* stroke) {
    body_ += "<path d=\"M" + px(x1) + " " + px(y1) + "L" + px(x2) + " " + px(y2) + "\" stroke=\"" + stroke + "\"/>\n";
  }
  void open(const std::string& title) { body_ += "<g><title>" + escaped(title) + "</title>\n"; }
  void close() { body_ += "</g>\n"; }

  std::string document(double width, double height) const {
    return "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"" + px(width) + "\" height=\"" + px(height) +
           "\" viewBox=\"0 0 " + px(width) + " " + px(height) +
           "\" font-family=\"Helvetica, Arial, sans-serif\" font-size=\"" + px(font_size) +
           "\">\n<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n" + body_ + "</svg>\n";
  }

 private:
  std::string body_;
};

constexpr const char* centred = " text-anchor=\"middle\"";

/// One op's share of a step, with its micro-batch where there is room.
void draw_share(Canvas& canvas, int rank, const Op& op, double x, double y, double width) {
  canvas.rect(x, y, width, bar_height, fill(op.pass, Picture::second_half(rank, op)));
  const std::string label = std::to_string(op.micro_batch);
  if (width >= digit_width * static_cast<double>(label.size()))
    canvas.text(x + width / 2, y + bar_height / 2 + font_size * 0.36, label, centred);
}

void draw_step(Canvas& canvas, int rank, const Step& step, double x, double y, double width) {
  if (!step.overlapped) {
    draw_share(canvas, rank, step.op, x, y, width);
    canvas.rect(x, y, width, bar_height, "none", " stroke=\"#ffffff\" stroke-width=\"0.8\"");
    return;
  }
  // Side by side in the proportion of forward to backward, and framed as one: both run during the whole of it.
  draw_share(canvas, rank, step.op, x, y, width / 3);
  draw_share(canvas, rank, *step.overlapped, x + width / 3, y, width * 2 / 3);
  canvas.rect(x + 0.4, y, std::max(0.0, width - 0.8), bar_height, "none", " stroke=\"#222222\" stroke-width=\"0.9\"");
}

const char* strip_fill(Lane lane) { return lane == Lane::collective ? "#7b4fb0" : "#c0504d"; }

bool any_transfers(const Timeline& timeline) {
  return std::any_of(timeline.intervals.begin(), timeline.intervals.end(), [](const Interval& interval) {
    return interval.lane != Lane::compute && interval.lane != Lane::node;
  });
}

/// Title, rows, axis.
class Panel {
 public:
  Panel(const Timeline& timeline, const Picture& picture, double left, double scale)
      : timeline_(timeline), picture_(picture), left_(left), scale_(scale) {}

  double height() const { return title_height + row_height * timeline_.num_ranks + axis_height; }

  void draw(Canvas& canvas, double top) const {
    const double rows = top + title_height, bottom = rows + row_height * timeline_.num_ranks;
    canvas.text(left_, top + title_height - 12, title(), " font-size=\"13\" font-weight=\"bold\"");
    draw_axis(canvas, rows, bottom);
    for (int rank = 0; rank < timeline_.num_ranks; ++rank) {
      const double y = rows + row_height * rank;
      canvas.text(left_ - 6, y + bar_height / 2 + font_size * 0.36, "rank " + std::to_string(rank),
                  " text-anchor=\"end\"");
      canvas.rect(left_, y, x(picture_.end) - left_, bar_height, "#f1f1f1");
      for (const Interval* interval : picture_.steps[static_cast<std::size_t>(rank)]) {
        canvas.open(to_string(interval->step) + ", " + span(*interval));
        draw_step(canvas, rank, interval->step, x(interval->begin), y, (interval->end - interval->begin) * scale_);
        canvas.close();
      }
    }
    for (const Interval& interval : timeline_.intervals) {
      // What lies outside of the computing (a closing sum of gradients) would run out of the picture.
      const double begin = std::max(interval.begin, picture_.begin), end = std::min(interval.end, picture_.end);
      if (interval.lane == Lane::compute || interval.lane == Lane::node || end <= begin) continue;
      const double y = rows + row_height * interval.rank + bar_height + 1;
      canvas.rect(x(begin), y, (end - begin) * scale_, strip_height, strip_fill(interval.lane),
                  " fill-opacity=\"0.6\"");
    }
  }

 private:
  double x(double time) const { return left_ + (time - picture_.begin) * scale_; }

  std::string unit() const { return timeline_.seconds_per_unit == 0 ? "" : " s"; }
  double seconds(double time) const {
    return timeline_.seconds_per_unit == 0 ? time : time * timeline_.seconds_per_unit;
  }

  std::string span(const Interval& interval) const {
    return detail::number(seconds(interval.begin - picture_.begin)) + " to " +
           detail::number(seconds(interval.end - picture_.begin)) + unit();
  }

  std::string title() const {
    return detail::str(timeline_.name, timeline_.name.empty() ? "" : ": ", timeline_.num_ranks, " ranks, ",
                       picture_.num_micro_batches, " micro-batches, makespan ",
                       detail::number(seconds(picture_.end - picture_.begin)), unit());
  }

  void draw_axis(Canvas& canvas, double top, double bottom) const {
    const double length = picture_.end - picture_.begin;
    if (length <= 0) return;
    const double to_unit = timeline_.seconds_per_unit == 0 ? 1 : timeline_.seconds_per_unit;
    const double tick = detail::round_step(70 / scale_ * to_unit) / to_unit;
    for (int i = 0; i * tick <= length * (1 + 1e-9); ++i) {
      const double at = x(picture_.begin + i * tick);
      canvas.line(at, top, at, bottom + 3, "#bbbbbb");
      canvas.text(at, bottom + 14, detail::number(seconds(i * tick)) + unit(), centred);
    }
  }

  const Timeline& timeline_;
  const Picture& picture_;
  double left_, scale_;
};

/// The shortest step of a computed timeline; in a measured one that may be a thousandth of the others, so at least half
/// their mean.
double short_step(const Picture& picture) {
  double sum = 0;
  std::size_t count = 0;
  for (const auto& steps : picture.steps) {
    for (const Interval* interval : steps) sum += interval->end - interval->begin;
    count += steps.size();
  }
  return std::max(picture.unit, count > 0 ? sum / static_cast<double>(count) / 2 : 0.0);
}

/// Returns the width.
double draw_legend(Canvas& canvas, double x, double y, const std::vector<Picture>& pictures, bool transfers) {
  bool shades = false;
  for (const Picture& picture : pictures) shades = shades || picture.second_halves;
  const auto label = [&](const std::string& text) {
    canvas.text(x, y + 12, text);
    x += digit_width * 0.9 * static_cast<double>(text.size()) + 18;
  };
  for (const Pass pass : {Pass::Forward, Pass::Backward, Pass::BackwardInput, Pass::BackwardWeight}) {
    canvas.rect(x, y, 14, 15, fill(pass, false));
    if (shades) canvas.rect(x + 14, y, 14, 15, fill(pass, true));
    x += shades ? 34 : 20;
    label(detail::pass_name(pass));
  }
  canvas.rect(x, y, 14, 15, fill(Pass::Forward, false));
  canvas.rect(x + 14, y, 28, 15, fill(Pass::Backward, shades));
  canvas.rect(x, y, 42, 15, "none", " stroke=\"#222222\"");
  x += 48;
  label("overlapped");
  if (transfers) {
    canvas.rect(x, y + 6, 24, strip_height, strip_fill(Lane::send), " fill-opacity=\"0.6\"");
    x += 30;
    label("send, receive");
    canvas.rect(x, y + 6, 24, strip_height, strip_fill(Lane::collective), " fill-opacity=\"0.6\"");
    x += 30;
    label("collective");
  }
  for (std::size_t i = 0; i < pictures.size(); ++i) {
    const std::string text = pictures[i].shades();
    if (!text.empty() && (i == 0 || text != pictures[i - 1].shades())) label(text);
  }
  return x;
}

}  // namespace

std::string to_svg(const std::vector<Timeline>& timelines) {
  DUALPIPE_CHECK(!timelines.empty(), "a picture needs at least one timeline");
  std::vector<Picture> pictures;
  for (const Timeline& timeline : timelines) pictures.emplace_back(timeline);

  // Wide enough for a micro-batch's digits in the short steps.
  double width = min_width, longest = 0;
  bool one_unit = true, transfers = false;
  int num_ranks = 0;
  for (std::size_t i = 0; i < timelines.size(); ++i) {
    const double length = pictures[i].end - pictures[i].begin;
    const auto digits =
        static_cast<double>(std::to_string(std::max(std::int64_t{0}, pictures[i].num_micro_batches - 1)).size());
    width = std::max(width, length / short_step(pictures[i]) * (digit_width * digits + 3));
    longest = std::max(longest, length);
    one_unit = one_unit && timelines[i].seconds_per_unit == timelines.front().seconds_per_unit;
    transfers = transfers || any_transfers(timelines[i]);
    num_ranks = std::max(num_ranks, timelines[i].num_ranks);
  }
  width = std::min(width, max_width);
  const double left = margin + digit_width * static_cast<double>(6 + std::to_string(std::max(0, num_ranks - 1)).size());

  Canvas canvas;
  double y = 0;
  for (std::size_t i = 0; i < timelines.size(); ++i) {
    const double length = one_unit ? longest : pictures[i].end - pictures[i].begin;
    const Panel panel(timelines[i], pictures[i], left, length > 0 ? width / length : 0);
    panel.draw(canvas, y);
    y += panel.height() + gap;
  }
  const double legend = draw_legend(canvas, left, y - gap + 8, pictures, transfers);
  return canvas.document(std::max(left + width + margin, legend), y - gap + legend_height + 8);
}

}  // namespace dualpipe
