#pragma once

/// DUALPIPE_DECL stands before each function whose body lies in an .ipp file. With DUALPIPE_HEADER_ONLY the headers
/// include these bodies; without it, the compiled library has them. A program does one or the other in all of its
/// files.
#if defined(DUALPIPE_HEADER_ONLY)
#define DUALPIPE_DECL inline
#else
#define DUALPIPE_DECL
#endif
